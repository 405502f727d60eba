// This file turns the environment into a checked config. One table has every setting
// with its default, help text and rule; --help prints the same table. Loading reads the
// files that settings name but changes nothing on disk, and it reports all problems at once.
package main

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// A config is the checked configuration. It does not change after the start.
type config struct {
	listenAddr        string
	metricsAddr       string // "": /metrics is on listenAddr only
	socketMode        fs.FileMode
	dataDir           string
	databaseFile      string          // of SQLite; "" with PostgreSQL
	postgres          *postgresConfig // nil: SQLite
	databaseName      string          // for messages: the file, or the URL without a password
	databaseWarnings  []string        // about the connection to PostgreSQL
	databasePassword  secret          // nil: not set
	databaseConns     int64
	databaseTimeout   time.Duration
	staleLimit        time.Duration
	replicaTimeout    time.Duration
	encryptionKey     secret // nil: use the key file in dataDir
	managementToken   secret // nil: stored management keys only
	openaiKey         secret // nil: no default project
	openaiURL         string
	allowPrivate      bool
	upstreamProxy     *url.URL // nil: providers are dialled directly
	publicURL         *url.URL // nil: not set
	trustedProxies    []netip.Prefix
	trustUnix         bool
	corsOrigins       []string // web pages of these origins may call /v1
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
	streamPing        time.Duration
	firstEventTimeout time.Duration
	drainTimeout      time.Duration
	drainDelay        time.Duration
	retention         time.Duration
	maxDatabaseBytes  int64 // 0: no limit
	maxContentBytes   int64
	maxCacheBytes     int64
	adminPages        bool
	settings          []effectiveSetting // for display
}

// An effectiveSetting is a setting in force. Value is hidden for a secret that is set.
type effectiveSetting struct {
	Name, Value, Help string
	IsDefault         bool
}

// A setting is one row of the settings table.
type setting struct {
	name, def string
	setter
	help string
}

// A setter checks the text of a setting and stores it in a field of a config.
type setter struct {
	set func(text string) error
	// secret keeps the text out of errors. It is set for the _FILE settings of secrets too,
	// because some users put the secret itself there.
	secret bool
}

// setParsed stores what parse returns.
func setParsed[T any](field *T, parse func(string) (T, error)) setter {
	return setter{set: func(text string) (err error) { *field, err = parse(text); return err }}
}

// setChecked stores a text that passes check.
func setChecked(field *string, check func(string) error) setter {
	return setter{set: func(text string) error { *field = text; return check(text) }}
}

// setUnchecked stores the text without a check.
func setUnchecked(field *string) setter { return setChecked(field, func(string) error { return nil }) }

func setSize(field *int64, minimum, maximum int64) setter {
	return setParsed(field, func(text string) (int64, error) { return parseSize(text, minimum, maximum) })
}

func setCount(field *int64, minimum, maximum int64) setter {
	return setParsed(field, func(text string) (int64, error) { return parseCount(text, minimum, maximum) })
}

func setDuration(field *time.Duration, minimum, maximum time.Duration) setter {
	return setParsed(field, func(text string) (time.Duration, error) { return parseDuration(text, minimum, maximum) })
}

func setBool(field *bool) setter { return setParsed(field, parseBool) }

// setSecret stores a secret that passes check.
func setSecret(field *secret, check func(string) error) setter {
	return setter{secret: true, set: func(text string) error { *field = newSecret(text); return check(text) }}
}

// setSecretFile stores the secret in the file that the setting names, if it passes check.
func setSecretFile(field *secret, check func(string) error) setter {
	return setter{secret: true, set: func(name string) error { return readSecretFile(name, field, check) }}
}

// settings returns the table of all settings, which are stored in c.
func settings(c *config) []setting {
	return slices.Concat(serverSettings(c), dataSettings(c), limitSettings(c))
}

func serverSettings(c *config) []setting {
	return []setting{
		{"LISTEN_ADDR", "127.0.0.1:8080", setChecked(&c.listenAddr, checkListen),
			"address and port to listen on. :8080: every address; unix:PATH: a socket; systemd: the inherited socket"},
		{"METRICS_ADDR", "", setChecked(&c.metricsAddr, checkMetricsListen),
			"address and port that serve /metrics without a key; default: on LISTEN_ADDR only, with a management key"},
		{"SOCKET_MODE", "0660", setParsed(&c.socketMode, parseFileMode),
			"octal file mode of a unix socket: who may connect"},
		{"PUBLIC_URL", "", setParsed(&c.publicURL, parsePublicURL),
			"URL that clients and browsers use, e.g. https://llm.example.com; /manage and /admin accept its host"},
		{"TRUSTED_PROXIES", "", setter{set: c.setTrustedProxies},
			"comma-separated addresses or CIDRs whose X-Forwarded-For is trusted; " +
				"unix: connections through the socket"},
		{"CORS_ORIGINS", "", setParsed(&c.corsOrigins, parseOrigins),
			"comma-separated origins of web pages that may call /v1, e.g. https://chat.example.com; default: none"},
		{"TLS_CERT_FILE", "", setUnchecked(&c.tlsCert),
			"PEM certificate chain; with TLS_KEY_FILE the proxy serves https. Reloaded when it changes, and on SIGHUP"},
		{"TLS_KEY_FILE", "", setUnchecked(&c.tlsKey),
			"PEM private key"},
		{"ADMIN_PAGES", "true", setBool(&c.adminPages),
			"false: no pages under /admin"},
		{"LOG_LEVEL", "info", setParsed(&c.logLevel, parseLevel),
			"debug, info, warn or error"},
		{"LOG_FORMAT", "json", setParsed(&c.logText, parseLogFormat),
			"json or text"},
	}
}

func dataSettings(c *config) []setting {
	return []setting{
		{"DATA_DIR", "./data", setParsed(&c.dataDir, filepath.Abs),
			"directory for the database and the key file; created with mode 0700 if missing"},
		{"DATABASE_URL", "", setter{set: c.setDatabaseURL},
			"sqlite:FILE for a database outside DATA_DIR, or postgres://USER@HOST/NAME; default: in DATA_DIR"},
		{"DATABASE_PASSWORD_FILE", "", setSecretFile(&c.databasePassword, checkDatabasePassword),
			"file with the password for PostgreSQL, if DATABASE_URL has none"},
		{"DATABASE_CONNECTIONS", "10", setCount(&c.databaseConns, 8, 1000),
			"connections to PostgreSQL, six of which are for writing, locks and notifications"},
		{"DATABASE_TIMEOUT", "10s", setDuration(&c.databaseTimeout, time.Second, 10*time.Minute),
			"how long PostgreSQL may take for a statement"},
		{"STALE_LIMIT", "5s", setDuration(&c.staleLimit, time.Second, time.Minute),
			"how long calls are admitted without news of changes from PostgreSQL, such as revoked tokens"},
		{"REPLICA_TIMEOUT", "10s", setDuration(&c.replicaTimeout, 2*time.Second, 10*time.Minute),
			"how long after its last heartbeat a replica counts as dead; more than STALE_LIMIT"},
		{"ENCRYPTION_KEY", "", setSecret(&c.encryptionKey, checkEncryptionKey),
			"32 random bytes in hex or base64; encrypts the provider keys in the database"},
		{"ENCRYPTION_KEY_FILE", "", setSecretFile(&c.encryptionKey, checkEncryptionKey),
			"file with the encryption key; if neither is set: DATA_DIR/encryption.key, created at the first start"},
		{"MANAGEMENT_TOKEN", "", setSecret(&c.managementToken, checkManagementToken),
			"a management key with role admin that is not in the database; at least 32 characters"},
		{"MANAGEMENT_TOKEN_FILE", "", setSecretFile(&c.managementToken, checkManagementToken),
			"file with MANAGEMENT_TOKEN"},
		{"OPENAI_API_KEY", "", setSecret(&c.openaiKey, checkProviderKey),
			"if the database is empty: creates a project \"default\" with this provider key, and a token"},
		// checkTogether checks this one with the next.
		{"OPENAI_API_URL", "https://api.openai.com", setUnchecked(&c.openaiURL),
			"base URL of a new project's first upstream, unless the request names one"},
		{"ALLOW_PRIVATE_UPSTREAMS", "false", setBool(&c.allowPrivate),
			"true: base URLs may be http:// and may name loopback or private addresses"},
		// The URL may have a password.
		{"UPSTREAM_PROXY", "", setter{secret: true, set: setParsed(&c.upstreamProxy, parseUpstreamProxy).set},
			"http://, https:// or socks5:// URL of a proxy through which all calls to providers go; default: none"},
	}
}

func limitSettings(c *config) []setting {
	const (
		minTimeout, maxTimeout = 100 * time.Millisecond, 2 * time.Hour
		day                    = 24 * time.Hour
	)
	return []setting{
		{"MAX_BODY_BYTES", "32MiB", setSize(&c.maxBodyBytes, 1<<10, 1<<30),
			"largest request body (JSON, audio, images) that is read into memory"},
		{"MAX_UPLOAD_BYTES", "512MiB", setSize(&c.maxUploadBytes, 1<<10, 1<<40),
			"largest file upload on stateful endpoints; uploads are streamed, not kept in memory"},
		{"BODY_MEMORY", "512MiB", setSize(&c.bodyMemory, 1<<20, 1<<40),
			"memory for all request bodies together; when full, calls get 503, and a token that uses a quarter 429"},
		{"MAX_CONCURRENT_CALLS", "10000", setCount(&c.maxCalls, 1, 1_000_000),
			"concurrent calls to /v1; further ones get 503 with Retry-After"},
		{"MAX_CONNECTIONS", "16384", setCount(&c.maxConnections, 1, 1_000_000),
			"open connections of clients; further ones are closed at once"},
		{"UPSTREAM_TIMEOUT", "10m", setDuration(&c.upstreamTimeout, minTimeout, maxTimeout),
			"how long a provider may take to start its answer"},
		{"FIRST_EVENT_TIMEOUT", "10s", setDuration(&c.firstEventTimeout, minTimeout, maxTimeout),
			"how long a stream's first event may take before the next upstream, if any, is tried"},
		{"STREAM_IDLE_TIMEOUT", "5m", setDuration(&c.streamIdleTimeout, minTimeout, maxTimeout),
			"how long an answer may pause before it is cut; its total time is not limited"},
		{"STREAM_PING_INTERVAL", "15s", setDuration(&c.streamPing, 10*time.Millisecond, 4*time.Minute),
			"how long the client of a verified stream waits for a ping while the stream is held back, at most 4m"},
		{"DRAIN_TIMEOUT", "30s", setDuration(&c.drainTimeout, 0, time.Hour),
			"how long running calls may continue after SIGTERM"},
		{"DRAIN_DELAY", "2s", setDuration(&c.drainDelay, 0, 10*time.Minute),
			"how long after SIGTERM connections are still accepted, to answer 503, so that load balancers notice"},
		{"RETENTION", "90d", setDuration(&c.retention, time.Hour, 3660*day),
			"how long the ledger keeps single calls; totals are kept longer"},
		{"MAX_DATABASE_BYTES", "", setSize(&c.maxDatabaseBytes, 16<<20, 1<<50),
			"database size above which the oldest single calls are deleted, whatever their age; default: no limit"},
		{"MAX_CONTENT_BYTES", "64KiB", setSize(&c.maxContentBytes, 1<<10, 16<<20),
			"how much of each request and answer is stored, in projects whose policy has keep_content_days"},
		{"MAX_CACHE_BYTES", "256MiB", setSize(&c.maxCacheBytes, 1<<20, 1<<40),
			"size of the cached answers on disk, of projects whose policy has cache; those used longest ago go first"},
	}
}

// A settingNotice is something about the environment that is probably a mistake, but no reason not to start.
type settingNotice struct{ name, finding, remedy string }

// settingNotices examines an environment (NAME=value) for names that are almost those of settings, which are
// ignored, and for proxies that are. It reads no value.
func (c *config) settingNotices(environment []string) (notices []settingNotice) {
	table := settings(&config{})
	isSetting := map[string]bool{}
	for _, s := range table {
		isSetting[s.name] = true
	}
	for _, line := range environment {
		name, value, _ := strings.Cut(line, "=")
		if isSetting[name] {
			continue
		}
		switch upper := strings.ToUpper(name); upper {
		case "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY":
			if value != "" && c.upstreamProxy == nil {
				notices = append(notices, settingNotice{name, name + " is set but not used",
					"calls to providers connect directly; if they should not, set UPSTREAM_PROXY"})
			}
		default:
			if meant := similarSetting(upper, table); meant != "" {
				notices = append(notices, settingNotice{name, clip(name, 64) + " is not a setting and is ignored",
					"did you mean " + meant + "?"})
			}
		}
	}
	return notices
}

// similarSetting returns the setting that somebody who wrote name probably meant, or "".
func similarSetting(name string, table []setting) (meant string) {
	for _, prefix := range [...]string{"LLM_PROXY_", "LLMPROXY_"} {
		name = strings.TrimPrefix(name, prefix)
	}
	best := 3 // a name with as many typing errors is another name
	for _, s := range table {
		if d := editDistance(name, s.name); d < best && (d < 2 || len(s.name) >= 8) {
			best, meant = d, s.name
		}
	}
	return meant
}

// editDistance returns how many characters must be added, removed or changed to make b of a. It stops at a
// difference in length that is large anyway.
func editDistance(a, b string) int {
	if len(a)-len(b) > 2 || len(b)-len(a) > 2 {
		return 3
	}
	row := make([]int, len(b)+1) // distances of the prefix of a so far to each prefix of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// settingText returns the text of a setting in the environment, or its default.
func settingText(getenv func(string) string, name string) string {
	if text := getenv(name); text != "" {
		return text
	}
	for _, s := range settings(&config{}) {
		if s.name == name {
			return s.def
		}
	}
	return ""
}

// loadConfig reads every setting through getenv. The error, if any, lists all problems,
// one per line, each with the setting's name and what to do.
func loadConfig(getenv func(string) string) (*config, error) {
	return loadConfigWith(getenv, checkDirectory)
}

// loadConfigWith is loadConfig with another check of directories, for commands that do
// not write to them.
func loadConfigWith(getenv func(string) string, checkDirectory func(string) error) (*config, error) {
	c := &config{}
	var problems []error
	invalid := map[string]bool{} // by name
	for _, s := range settings(c) {
		text := getenv(s.name)
		if strings.TrimSpace(text) != text {
			invalid[s.name] = true
			problems = append(problems, fmt.Errorf("%s: has white space around its value; remove it", s.name))
			continue
		}
		isDefault := text == ""
		shown := cmp.Or(text, s.def)
		if s.secret && !isDefault {
			shown = hiddenSecret
		}
		c.settings = append(c.settings, effectiveSetting{s.name, shown, s.help, isDefault})
		if text = cmp.Or(text, s.def); text == "" {
			continue
		}
		if err := s.set(text); err != nil {
			invalid[s.name] = true
			problems = append(problems, fmt.Errorf("%s: %s%w", s.name, quoteValue(s.secret, text), err))
		}
	}
	problems = append(problems, c.checkTogether(getenv, invalid)...)
	problems = append(problems, c.checkPostgres()...)
	problems = append(problems, checkTLS(c)...)
	problems = append(problems, c.checkFiles(checkDirectory)...)
	for i := range c.settings {
		if v := &c.settings[i]; v.Name == "DATABASE_URL" && !v.IsDefault {
			v.Value = c.databaseName
		}
	}
	return c, errors.Join(problems...)
}

// checkTogether checks the rules about two settings. It skips those whose own value is
// invalid.
func (c *config) checkTogether(getenv func(string) string, invalid map[string]bool) (problems []error) {
	for _, name := range []string{"ENCRYPTION_KEY", "MANAGEMENT_TOKEN"} {
		if getenv(name) != "" && getenv(name+"_FILE") != "" {
			problems = append(problems, fmt.Errorf("%[1]s and %[1]s_FILE: cannot be combined; unset one", name))
		}
	}
	if c.openaiURL != "" && !invalid["ALLOW_PRIVATE_UPSTREAMS"] {
		if _, err := parseBaseURL(c.openaiURL, c.allowPrivate); err != nil {
			problems = append(problems, fmt.Errorf("OPENAI_API_URL: %s%w", quoteValue(false, c.openaiURL), err))
		}
	}
	if c.bodyMemory < c.maxBodyBytes && !invalid["BODY_MEMORY"] {
		problems = append(problems, errors.New("BODY_MEMORY: must be at least MAX_BODY_BYTES"))
	}
	return problems
}

// checkPostgres checks the settings of PostgreSQL together, and completes them.
func (c *config) checkPostgres() (problems []error) {
	if c.postgres == nil {
		if c.databasePassword != nil {
			problems = append(problems, errors.New("DATABASE_PASSWORD_FILE: is for PostgreSQL; set DATABASE_URL to "+
				"postgres://USER@HOST/NAME, or unset it"))
		}
		return problems
	}
	c.postgres.password, c.postgres.version = c.databasePassword, versionText()
	c.postgres.connections, c.postgres.timeout = c.databaseConns, c.databaseTimeout
	c.postgres.staleLimit, c.postgres.replicaTimeout = c.staleLimit, c.replicaTimeout
	if c.replicaTimeout <= c.staleLimit {
		problems = append(problems, errors.New("REPLICA_TIMEOUT: must be more than STALE_LIMIT"))
	}
	if c.maxDatabaseBytes != 0 {
		problems = append(problems, errors.New("MAX_DATABASE_BYTES: is for SQLite; with PostgreSQL, set RETENTION and "+
			"watch the disk of its server"))
	}
	return problems
}

// setDatabaseURL stores what DATABASE_URL names.
func (c *config) setDatabaseURL(text string) (err error) {
	if !isPostgresURL(text) {
		c.databaseFile, err = parseDatabaseURL(text)
		return err
	}
	c.databaseName, c.databaseWarnings, err = checkPostgresURL(text)
	c.postgres = &postgresConfig{url: newSecret(text)}
	return err
}

func (c *config) setTrustedProxies(text string) (err error) {
	c.trustUnix, c.trustedProxies, err = parseTrustedProxies(text)
	return err
}

// checkFiles checks where the database is, and chooses its file if DATABASE_URL is not set.
func (c *config) checkFiles(checkDirectory func(string) error) (problems []error) {
	if c.dataDir == "" {
		return nil
	}
	if err := checkDirectory(c.dataDir); err != nil {
		problems = append(problems, fmt.Errorf("DATA_DIR: %w", err))
	}
	if c.postgres != nil {
		c.dataDir = resolveLinks(c.dataDir)
		return problems
	}
	if c.databaseFile == "" {
		c.databaseFile = filepath.Join(c.dataDir, "llm-proxy.db")
	} else if err := checkDatabaseFile(c.databaseFile, checkDirectory); err != nil {
		problems = append(problems, fmt.Errorf("DATABASE_URL: %w", err))
	}
	c.dataDir, c.databaseFile = resolveLinks(c.dataDir), resolveLinks(c.databaseFile)
	c.databaseName = c.databaseFile
	return problems
}

// quoteValue quotes a setting's value for an error, unless it is a secret or a URL that may
// contain one.
func quoteValue(secret bool, text string) string {
	if secret || strings.ContainsAny(text, "@?#") {
		return "the value "
	}
	return strconv.Quote(clip(text, 200)) + " "
}

// writeSettings prints the settings table for --help.
func writeSettings(w *tabwriter.Writer) {
	for _, s := range settings(&config{}) {
		fmt.Fprintf(w, "  %s\t%s\t%s\n", s.name, cmp.Or(s.def, "-"), s.help)
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

func checkEncryptionKey(s string) error {
	_, err := parseEncryptionKey(s)
	return err
}

func checkManagementToken(s string) error {
	if len(s) < 32 {
		return errors.New("must have at least 32 characters; create one with: openssl rand -hex 32")
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
		return errors.New("has too few different characters to be random; create one with: openssl rand -hex 32")
	}
	for _, sample := range []string{"changeme", "change-me", "change_me", "your-", "your_", "example", "placeholder",
		"secret-token", "management-token"} {
		if strings.Contains(lower, sample) {
			return errors.New("looks like a sample from documentation; create one with: openssl rand -hex 32")
		}
	}
	return nil
}

// checkProviderKey rejects what cannot be a provider's key, above all the masked form in
// which providers show a key.
func checkProviderKey(s string) error {
	switch {
	case strings.ContainsAny(s, "*…") || strings.Contains(s, "...") || s == hiddenSecret:
		return errors.New("looks masked or truncated; enter the whole key")
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

func parsePublicURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("must be a scheme and a host, as in https://llm.example.com")
	}
	return u, nil
}

// parseOrigins reads a list of origins, each exactly as browsers send it. The error names every entry that is none.
func parseOrigins(s string) (origins []string, err error) {
	var wrong []string
	for item := range strings.SplitSeq(s, ",") {
		item = strings.TrimSpace(item)
		if problem := originProblem(item); problem != "" {
			wrong = append(wrong, quoteValue(false, item)+problem)
		}
		origins = append(origins, item)
	}
	if len(wrong) > 0 {
		return nil, errors.New("must list origins such as https://chat.example.com; " + strings.Join(wrong, "; "))
	}
	return origins, nil
}

// originProblem says why s is not the origin of a page that may be trusted, as browsers send it; "" if it is.
func originProblem(s string) string {
	u, err := url.Parse(s)
	switch {
	case strings.Contains(s, "*"):
		return "has a wildcard; name each origin"
	case s == "null":
		return "is the origin of any file and any sandboxed page"
	case err != nil || u.Scheme == "" || u.Hostname() == "":
		return "is not a scheme and a host"
	case u.User != nil || u.Path != "" || strings.ContainsAny(s, "?#"):
		return "has more than a scheme, a host and a port; an origin does not end with a slash"
	case strings.ToLower(s) != s || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "must be in lower case and ASCII (xn--), as browsers send it"
	}
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "1"), 10, 16)
	if err != nil || strings.HasSuffix(s, ":") || u.Port() != "" && strconv.FormatUint(port, 10) != u.Port() ||
		u.Scheme == "https" && port == 443 || u.Scheme == "http" && port == 80 {
		return "has a port that browsers leave out or write in another way"
	}
	return ""
}

// parseUpstreamProxy reads the URL of a proxy.
func parseUpstreamProxy(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || !slices.Contains([]string{"http", "https", "socks5"}, u.Scheme) || u.Port() == "" ||
		u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("must be a scheme, a host and a port, as in http://10.0.0.5:3128, " +
			"https://USER:PASSWORD@HOST:PORT or socks5://10.0.0.5:1080")
	}
	return u, checkHost(u.Hostname(), true) // proxies usually have private addresses
}

// parseCount reads a whole number.
func parseCount(s string, minimum, maximum int64) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < minimum || n > maximum {
		return 0, fmt.Errorf("must be a whole number from %d to %d", minimum, maximum)
	}
	return n, nil
}

// parseDuration reads a duration in Go's format, or in whole days as in 90d.
func parseDuration(s string, minimum, maximum time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if digits, ok := strings.CutSuffix(s, "d"); ok {
		var days uint64
		days, err = strconv.ParseUint(digits, 10, 16)
		d = time.Duration(days) * 24 * time.Hour
	}
	if err != nil {
		return 0, errors.New("must be a duration with a unit, as in 30s, 5m, 2h or 90d")
	}
	if d < minimum || d > maximum {
		return 0, fmt.Errorf("must be from %s to %s", formatDuration(minimum), formatDuration(maximum))
	}
	return d, nil
}

// A build describes what this binary was built from.
type build struct{ version, revision, goVersion string }

// linkedVersion is the version if the linker sets it (Dockerfile), because a build outside
// the repository has none. Nothing else writes it.
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
