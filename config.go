// This room turns the environment into a checked config: every setting, its
// default and its rule stand in one table, from which --help is made too. It
// reads files that settings name, but changes nothing on disk; everything that
// is wrong is reported at once.
package main

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// A config is the whole configuration, checked. It does not change after start.
type config struct {
	listenAddr        string
	metricsAddr       string // "": not on an address of its own
	socketMode        fs.FileMode
	dataDir           string
	databaseFile      string
	encryptionKey     secret // nil: the key file in dataDir
	managementToken   secret // nil: only stored management keys
	openaiKey         secret // nil: no default project
	openaiURL         string
	allowPrivate      bool
	publicURL         *url.URL // nil: not set
	trustedProxies    []netip.Prefix
	trustUnix         bool
	tlsCert, tlsKey   string
	logLevel          slog.Level
	logText           bool
	maxBodyBytes      int64
	maxUploadBytes    int64
	bodyMemory        int64
	maxConnections    int64
	maxCalls          int64
	upstreamTimeout   time.Duration
	streamIdleTimeout time.Duration
	firstEventTimeout time.Duration
	drainTimeout      time.Duration
	retention         time.Duration
	maxDatabaseBytes  int64 // 0: no limit
	maxContentBytes   int64
	adminPages        bool
	settings          []effectiveSetting // all of it, to be shown
}

// A effectiveSetting is a setting as it is in force. Of a secret one Value says only
// whether it is set.
type effectiveSetting struct {
	Name, Value, Help string
	IsDefault         bool
}

// A setting is one row of the settings table. set checks text and stores it.
type setting struct {
	name, def, help string
	secret          bool // not quoted in errors; of the file settings too, for some put the secret itself there
	set             func(c *config, text string) error
}

func settings() []setting {
	return []setting{
		{"LISTEN_ADDR", "127.0.0.1:8080", "address and port to listen on; :8080 listens on every address, unix:PATH on a socket, systemd on the one handed down", false,
			func(c *config, s string) error { c.listenAddr = s; return checkListen(s) }},
		{"METRICS_ADDR", "", "address and port that serve /metrics without a key; empty: on LISTEN_ADDR only, with a management key", false,
			func(c *config, s string) error {
				c.metricsAddr = s
				if s == systemdListen {
					return errors.New("must be an address of its own; the socket handed down is for LISTEN_ADDR")
				}
				return checkListen(s)
			}},
		{"SOCKET_MODE", "0660", "who may connect to a unix socket: the file's mode, octal", false,
			func(c *config, s string) (err error) { c.socketMode, err = parseFileMode(s); return err }},
		{"DATA_DIR", "./data", "directory for the database and the key file; made if missing, 0700", false,
			func(c *config, s string) (err error) { c.dataDir, err = filepath.Abs(s); return err }},
		{"DATABASE_URL", "", "sqlite:FILE for a database outside DATA_DIR; empty: DATA_DIR/llm-proxy.db", false,
			func(c *config, s string) (err error) { c.databaseFile, err = parseDatabaseURL(s); return err }},
		{"ENCRYPTION_KEY", "", "32 random bytes, hex or base64, that seal provider keys in the database", true,
			func(c *config, s string) error {
				c.encryptionKey = newSecret(s)
				_, err := parseEncryptionKey(s)
				return err
			}},
		{"ENCRYPTION_KEY_FILE", "", "file that holds the encryption key; neither set: DATA_DIR/encryption.key, made at first start", true,
			func(c *config, s string) error {
				return readSecretFile(s, &c.encryptionKey, func(v string) error { _, err := parseEncryptionKey(v); return err })
			}},
		{"MANAGEMENT_TOKEN", "", "a management key of role admin that lives in the environment; 32 characters or more", true,
			func(c *config, s string) error { c.managementToken = newSecret(s); return checkManagementToken(s) }},
		{"MANAGEMENT_TOKEN_FILE", "", "file that holds MANAGEMENT_TOKEN", true,
			func(c *config, s string) error { return readSecretFile(s, &c.managementToken, checkManagementToken) }},
		{"OPENAI_API_KEY", "", "on an empty database: makes a project \"default\" with this provider key, and a token", true,
			func(c *config, s string) error { c.openaiKey = newSecret(s); return checkProviderKey(s) }},
		{"OPENAI_API_URL", "https://api.openai.com", "base URL of new projects' first upstream that names none", false,
			func(c *config, s string) error { c.openaiURL = s; return nil }}, // checked with ALLOW_PRIVATE_UPSTREAMS below
		{"ALLOW_PRIVATE_UPSTREAMS", "false", "true: base URLs may be http:// and may name loopback or private addresses", false,
			func(c *config, s string) (err error) { c.allowPrivate, err = parseBool(s); return err }},
		{"PUBLIC_URL", "", "the URL clients and browsers use, e.g. https://llm.example.com; its host is accepted on /manage and /admin", false,
			func(c *config, s string) (err error) { c.publicURL, err = parsePublicURL(s); return err }},
		{"ADMIN_PAGES", "true", "false: no pages at /admin", false,
			func(c *config, s string) (err error) { c.adminPages, err = parseBool(s); return err }},
		{"TRUSTED_PROXIES", "", "comma-separated addresses or CIDRs whose X-Forwarded-For is believed; unix: who comes by the socket", false,
			func(c *config, s string) (err error) {
				c.trustUnix, c.trustedProxies, err = parseTrustedProxies(s)
				return err
			}},
		{"TLS_CERT_FILE", "", "certificate chain, PEM; with TLS_KEY_FILE the proxy serves https itself. Read anew when it changes, and at SIGHUP", false,
			func(c *config, s string) error { c.tlsCert = s; return nil }},
		{"TLS_KEY_FILE", "", "private key, PEM", false,
			func(c *config, s string) error { c.tlsKey = s; return nil }},
		{"LOG_LEVEL", "info", "debug, info, warn or error", false,
			func(c *config, s string) (err error) { c.logLevel, err = parseLevel(s); return err }},
		{"LOG_FORMAT", "json", "json or text", false,
			func(c *config, s string) error { c.logText = s == "text"; return checkOneOf(s, "json", "text") }},
		{"MAX_BODY_BYTES", "32MiB", "largest request body (JSON, audio, images) that is read into memory", false,
			func(c *config, s string) (err error) { c.maxBodyBytes, err = parseSize(s, 1<<10, 1<<30); return err }},
		{"MAX_UPLOAD_BYTES", "512MiB", "largest file upload on stateful endpoints; streamed, not held in memory", false,
			func(c *config, s string) (err error) { c.maxUploadBytes, err = parseSize(s, 1<<10, 1<<40); return err }},
		{"BODY_MEMORY", "512MiB", "memory that all request bodies being handled may take together; beyond it calls get 503", false,
			func(c *config, s string) (err error) { c.bodyMemory, err = parseSize(s, 1<<20, 1<<40); return err }},
		{"MAX_CONCURRENT_CALLS", "10000", "calls to /v1 that may run together; beyond it new ones get 503 and Retry-After", false,
			func(c *config, s string) (err error) { c.maxCalls, err = parseCount(s, 1, 1_000_000); return err }},
		{"MAX_CONNECTIONS", "16384", "connections that clients may have open together; beyond it new ones are closed at once", false,
			func(c *config, s string) (err error) { c.maxConnections, err = parseCount(s, 1, 1_000_000); return err }},
		{"UPSTREAM_TIMEOUT", "10m", "how long a provider may take to begin its answer", false,
			func(c *config, s string) (err error) {
				c.upstreamTimeout, err = parseDuration(s, 100*time.Millisecond, 2*time.Hour)
				return err
			}},
		{"FIRST_EVENT_TIMEOUT", "10s", "how long a stream's first event may take before the next upstream is tried, where there is one", false,
			func(c *config, s string) (err error) {
				c.firstEventTimeout, err = parseDuration(s, 100*time.Millisecond, 2*time.Hour)
				return err
			}},
		{"STREAM_IDLE_TIMEOUT", "5m", "how long an answer may pause before it is cut; answers have no total limit", false,
			func(c *config, s string) (err error) {
				c.streamIdleTimeout, err = parseDuration(s, 100*time.Millisecond, 2*time.Hour)
				return err
			}},
		{"DRAIN_TIMEOUT", "30s", "how long running calls may go on after SIGTERM", false,
			func(c *config, s string) (err error) {
				c.drainTimeout, err = parseDuration(s, 0, time.Hour)
				return err
			}},
		{"RETENTION", "90d", "how long the ledger keeps single calls; sums are kept longer", false,
			func(c *config, s string) (err error) {
				c.retention, err = parseDuration(s, time.Hour, 3660*24*time.Hour)
				return err
			}},
		{"MAX_DATABASE_BYTES", "", "size of the database beyond which the oldest single calls go, whatever their age; empty: no limit", false,
			func(c *config, s string) (err error) {
				c.maxDatabaseBytes, err = parseSize(s, 16<<20, 1<<50)
				return err
			}},
		{"MAX_CONTENT_BYTES", "64KiB", "how much of a request and of an answer is kept, of projects whose policy has keep_content_days", false,
			func(c *config, s string) (err error) {
				c.maxContentBytes, err = parseSize(s, 1<<10, 16<<20)
				return err
			}},
	}
}

// settingText returns a setting as the environment has it, or its default.
func settingText(getenv func(string) string, name string) string {
	if text := getenv(name); text != "" {
		return text
	}
	for _, s := range settings() {
		if s.name == name {
			return s.def
		}
	}
	return ""
}

// loadConfig reads every setting through getenv. The error, if any, lists all
// problems, one a line, each with the setting's name and what to do.
func loadConfig(getenv func(string) string) (*config, error) {
	return loadConfigWith(getenv, checkDirectory)
}

// loadConfigWith is loadConfig with another check of the directories that files are
// kept in: for a command that writes none.
func loadConfigWith(getenv func(string) string, checkDirectory func(string) error) (*config, error) {
	c := &config{}
	var problems []error
	bad := map[string]bool{}
	for _, s := range settings() {
		text := getenv(s.name)
		if strings.TrimSpace(text) != text {
			bad[s.name] = true
			problems = append(problems, fmt.Errorf("%s: has white space around its value; remove it", s.name))
			continue
		}
		given := text != ""
		if !given {
			text = s.def
		}
		shown := text
		if s.secret && given {
			shown = hiddenSecret
		}
		c.settings = append(c.settings, effectiveSetting{s.name, shown, s.help, !given})
		if text == "" {
			continue
		}
		if err := s.set(c, text); err != nil {
			bad[s.name] = true
			problems = append(problems, fmt.Errorf("%s: %s%w", s.name, quoteValue(s.secret, text), err))
		}
	}
	for _, pair := range [][2]string{
		{"ENCRYPTION_KEY", "ENCRYPTION_KEY_FILE"}, {"MANAGEMENT_TOKEN", "MANAGEMENT_TOKEN_FILE"},
	} {
		if getenv(pair[0]) != "" && getenv(pair[1]) != "" {
			problems = append(problems, fmt.Errorf("%s and %s: exclude each other; unset one", pair[0], pair[1]))
		}
	}
	if c.openaiURL != "" && !bad["ALLOW_PRIVATE_UPSTREAMS"] {
		if _, err := parseBaseURL(c.openaiURL, c.allowPrivate); err != nil {
			problems = append(problems, fmt.Errorf("OPENAI_API_URL: %s%w", quoteValue(false, c.openaiURL), err))
		}
	}
	if c.bodyMemory < c.maxBodyBytes && !bad["BODY_MEMORY"] {
		problems = append(problems, errors.New("BODY_MEMORY: must be at least MAX_BODY_BYTES"))
	}
	problems = append(problems, checkTLS(c)...)
	if c.dataDir != "" {
		if err := checkDirectory(c.dataDir); err != nil {
			problems = append(problems, fmt.Errorf("DATA_DIR: %w", err))
		}
		if c.databaseFile == "" {
			c.databaseFile = filepath.Join(c.dataDir, "llm-proxy.db")
		} else if err := checkDatabaseFile(c, checkDirectory); err != nil {
			problems = append(problems, fmt.Errorf("DATABASE_URL: %w", err))
		}
	}
	return c, errors.Join(problems...)
}

// quoteValue quotes a setting's value for an error, unless it is a secret or a
// URL that may have one in it.
func quoteValue(secret bool, text string) string {
	if secret || strings.ContainsAny(text, "@?#") {
		return "the value "
	}
	return strconv.Quote(clip(text, 200)) + " "
}

// writeSettings prints the settings table for --help.
func writeSettings(w *tabwriter.Writer) {
	for _, s := range settings() {
		def := s.def
		if def == "" {
			def = "-"
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\n", s.name, def, s.help)
	}
	w.Flush()
}

func checkTLS(c *config) []error {
	switch {
	case c.tlsCert == "" && c.tlsKey == "":
		return nil
	case c.tlsKey == "":
		return []error{errors.New("TLS_CERT_FILE: is set without TLS_KEY_FILE; set both or neither")}
	case c.tlsCert == "":
		return []error{errors.New("TLS_KEY_FILE: is set without TLS_CERT_FILE; set both or neither")}
	}
	if _, err := tls.LoadX509KeyPair(c.tlsCert, c.tlsKey); err != nil {
		return []error{fmt.Errorf("TLS_CERT_FILE, TLS_KEY_FILE: not a usable pair: %w", unwrapPathError(err))}
	}
	return nil
}

// checkDirectory reports whether dir can be written to, or made. It changes
// nothing that stays.
func checkDirectory(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if parent := filepath.Dir(dir); parent != dir {
			return checkDirectory(parent)
		}
	}
	if err != nil {
		return fmt.Errorf("%q: %s", dir, unwrapPathError(err))
	}
	if !info.IsDir() {
		return fmt.Errorf("%q is not a directory", dir)
	}
	f, err := os.CreateTemp(dir, ".writable-*")
	if err != nil {
		return fmt.Errorf("%q cannot be written to: %s; give this user the right, or name another directory", dir, unwrapPathError(err))
	}
	f.Close()
	return os.Remove(f.Name())
}

// checkDatabaseFile looks at a database outside DATA_DIR, whose directory is
// not ours to make.
func checkDatabaseFile(c *config, checkDirectory func(string) error) error {
	dir := filepath.Dir(c.databaseFile)
	if info, err := os.Stat(c.databaseFile); err == nil && info.IsDir() {
		return fmt.Errorf("%q is a directory; name a file in it", c.databaseFile)
	}
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("%q: %w; make the directory first", dir, unwrapPathError(err))
	}
	return checkDirectory(dir)
}

func checkListen(s string) error {
	if path, ok := strings.CutPrefix(s, unixPrefix); ok {
		if !filepath.IsAbs(path) || len(path) > 100 || strings.ContainsRune(path, 0) {
			return errors.New("must be unix: followed by an absolute path of at most 100 bytes")
		}
		return nil
	}
	if s == systemdListen {
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return errors.New("must be HOST:PORT, as in 127.0.0.1:8080 or :8080, or unix:/path")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n > 65535 {
		return errors.New("has a port that is not a number from 0 to 65535")
	}
	if host != "" && host != "localhost" {
		if _, err := netip.ParseAddr(host); err != nil {
			return errors.New("must name an IP address of this machine, localhost, or nothing for all of them")
		}
	}
	return nil
}

func parseDatabaseURL(s string) (string, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	switch {
	case ok && (scheme == "postgres" || scheme == "postgresql"):
		return "", errors.New("names PostgreSQL, which this binary is built without")
	case !ok || scheme != "sqlite" || strings.TrimPrefix(rest, "//") == "":
		return "", errors.New("must be sqlite:FILE")
	}
	return filepath.Abs(strings.TrimPrefix(rest, "//"))
}

// readSecretFile reads a secret from a file that only its owner should be able
// to read; a trailing newline does not belong to it.
func readSecretFile(name string, to *secret, check func(string) error) error {
	f, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("names a file that cannot be read: %w", unwrapPathError(err))
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4097))
	if err != nil {
		return fmt.Errorf("names a file that cannot be read: %w", unwrapPathError(err))
	}
	if len(b) > 4096 {
		return errors.New("names a file that is larger than 4 KiB; it must hold the secret alone")
	}
	v := string(bytes.TrimRight(b, "\r\n"))
	if err := check(v); err != nil {
		return fmt.Errorf("names a file whose text %w", err)
	}
	*to = newSecret(v)
	return nil
}

func unwrapPathError(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

func checkManagementToken(s string) error {
	if len(s) < 32 {
		return errors.New("must have 32 characters or more; make one with: openssl rand -hex 32")
	}
	seen := map[rune]bool{}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			return errors.New("must have printable ASCII characters only, without spaces")
		}
		seen[r] = true
	}
	lower := strings.ToLower(s)
	if len(seen) < 10 {
		return errors.New("repeats too few characters to be random; make one with: openssl rand -hex 32")
	}
	for _, sample := range []string{"changeme", "change-me", "change_me", "your-", "your_", "example", "placeholder", "secret-token", "management-token"} {
		if strings.Contains(lower, sample) {
			return errors.New("looks like a sample from documentation; make one with: openssl rand -hex 32")
		}
	}
	return nil
}

// checkProviderKey refuses what cannot be a provider's key, and above all the
// masked form in which a key is shown.
func checkProviderKey(s string) error {
	switch {
	case strings.ContainsAny(s, "*…") || strings.Contains(s, "...") || s == hiddenSecret:
		return errors.New("is a masked key; give the whole key")
	case len(s) < 8 || len(s) > 4096:
		return errors.New("must have 8 to 4096 characters")
	}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			return errors.New("must have printable ASCII characters only, without spaces")
		}
	}
	return nil
}

func parseBool(s string) (bool, error) {
	if err := checkOneOf(s, "true", "false"); err != nil {
		return false, err
	}
	return s == "true", nil
}

func checkOneOf(s string, allowed ...string) error {
	if slices.Contains(allowed, s) {
		return nil
	}
	return fmt.Errorf("must be one of: %s", strings.Join(allowed, ", "))
}

func parseLevel(s string) (slog.Level, error) {
	var l slog.Level
	if err := checkOneOf(s, "debug", "info", "warn", "error"); err != nil {
		return l, err
	}
	return l, l.UnmarshalText([]byte(s))
}

func parsePublicURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("must be a scheme and a host, as in https://llm.example.com")
	}
	return u, nil
}

// parseFileMode reads the permissions of a file.
func parseFileMode(s string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 || n&0o600 != 0o600 {
		return 0, errors.New("must be octal permissions that let the owner read and write, as in 0660")
	}
	return fs.FileMode(n), nil
}

// parseTrustedProxies reads a list of networks, in which unix stands for the socket.
func parseTrustedProxies(s string) (socket bool, nets []netip.Prefix, err error) {
	var rest []string
	for item := range strings.SplitSeq(s, ",") {
		if strings.TrimSpace(item) == "unix" {
			socket = true
		} else {
			rest = append(rest, item)
		}
	}
	if len(rest) > 0 {
		nets, err = parsePrefixes(strings.Join(rest, ","))
	}
	return socket, nets, err
}

func parsePrefixes(s string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for item := range strings.SplitSeq(s, ",") {
		item = strings.TrimSpace(item)
		if addr, err := netip.ParseAddr(item); err == nil {
			out = append(out, netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(item)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("must list addresses or networks such as 10.0.0.0/8; %q is neither", item)
		}
		out = append(out, p)
	}
	return out, nil
}

// parseCount reads a whole number.
func parseCount(s string, least, most int64) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("must be a whole number from %d to %d", least, most)
	}
	return n, nil
}

// parseDuration reads a duration in Go's form, or in whole days as in 90d.
func parseDuration(s string, least, most time.Duration) (time.Duration, error) {
	var d time.Duration
	if digits, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(digits, 10, 16)
		if err != nil {
			return 0, errors.New("must be a duration with a unit, as in 30s, 5m, 2h or 90d")
		}
		d = time.Duration(n) * 24 * time.Hour
	} else {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			return 0, errors.New("must be a duration with a unit, as in 30s, 5m, 2h or 90d")
		}
	}
	if d < least || d > most {
		return 0, fmt.Errorf("must be from %s to %s", formatDuration(least), formatDuration(most))
	}
	return d, nil
}

// A build is what this binary was made from.
type build struct{ version, revision, goVersion string }

// linkedVersion is the version, where the linker was told one (Dockerfile): a build
// without the repository knows none. Nothing else writes it.
var linkedVersion string

func readBuildInfo() build {
	b := build{version: cmp.Or(linkedVersion, "devel")}
	if info, ok := debug.ReadBuildInfo(); ok {
		b.goVersion = info.GoVersion
		if linkedVersion == "" && info.Main.Version != "" && info.Main.Version != "(devel)" {
			b.version = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.revision = s.Value
			}
		}
	}
	return b
}

func versionText() string {
	b := readBuildInfo()
	return strings.Join(strings.Fields("llm-proxy "+b.version+" "+b.revision+" "+b.goVersion), " ")
}
