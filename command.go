// This file has the commands that work beside a running server: healthcheck asks it over
// HTTP, backup copies its database, audit verify checks its audit trail, prices prints one price.
// They may not change anything of the server's. It also has, for restore, what is left of policies and
// upstreams where two databases must both allow it: plain code, which changes rows in memory only.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A program is one run of the executable. Tests replace its connections to the outside.
type program struct {
	getenv         func(string) string
	environment    []string // all of it, as NAME=value
	stdout, stderr io.Writer
	ready          func(addr net.Addr) // called when listening; may be nil
	hangups        chan os.Signal      // SIGHUP; nil: not handled
}

const usageText = `llm-proxy: a transparent, secure proxy between client programs and LLM APIs.

  llm-proxy [serve]            serve, with settings from the environment
  llm-proxy demo               serve with a stand-in provider and sample data; nothing is kept
  llm-proxy doctor [--provider]  check configuration, key, database and disk; with --provider the providers too
  llm-proxy healthcheck        exit 0 if the server at LISTEN_ADDR answers
  llm-proxy backup FILE        write a consistent copy of the database, with the server running or not
  llm-proxy restore FILE [--revoke=since|all|none]
                               replace the database with a backup, with the server stopped
  llm-proxy migrate-database --from sqlite:FILE --to postgres://USER@HOST/NAME
                               copy a SQLite database to PostgreSQL, with the server stopped
  llm-proxy audit verify [SEQ:MAC]
                               check the audit trail for changed or removed events
  llm-proxy rekey [FILE]       change the encryption key, with the server stopped: to the one in FILE,
                               or to a new one that replaces the key file
  llm-proxy prices MODEL [PROVIDER]
                               print the price that holds for a model, your own or the list price
  llm-proxy version

Settings (environment variables), their defaults and what they do:

`

// noArgs calls do if the command has no arguments.
func (p *program) noArgs(args []string, do func() error) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q; see llm-proxy --help", clip(args[0], 64))
	}
	return do()
}

// config loads the configuration. The error lists all its problems.
func (p *program) config() (*config, error) {
	cfg, err := loadConfig(p.getenv)
	if err != nil {
		return nil, fmt.Errorf("the configuration has problems:\n%w", err)
	}
	return cfg, nil
}

// healthcheck asks the server at LISTEN_ADDR whether it answers. It reads no secret and
// ignores problems of other settings, which the server reports.
func (p *program) healthcheck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	addr := settingText(p.getenv, "LISTEN_ADDR")
	if err := checkListen(addr); err != nil {
		return fmt.Errorf("LISTEN_ADDR: %w", err)
	}
	if addr == systemdListen {
		return errors.New("LISTEN_ADDR: systemd chose the address; for this command, set it to that address")
	}
	target := &url.URL{Scheme: "http", Host: "localhost", Path: "/healthz"}
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		if path, ok := strings.CutPrefix(addr, unixPrefix); ok {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
		return dialAny(ctx, network, dialTargets(addr))
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: dial}
	if file := settingText(p.getenv, "TLS_CERT_FILE"); file != "" {
		target.Scheme = "https"
		var err error
		if transport.TLSClientConfig, err = pinnedTLSConfig(file); err != nil {
			return fmt.Errorf("TLS_CERT_FILE: %w", err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return err
	}
	res, err := transport.RoundTrip(req) // RoundTrip follows no redirect
	if err != nil {
		return fmt.Errorf("no answer from %s: %w", addr, err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the server at %s answers %d to /healthz", addr, res.StatusCode)
	}
	return nil
}

// dialTargets returns the addresses under which this machine reaches a listener on addr.
func dialTargets(addr string) []string {
	host, port, _ := net.SplitHostPort(addr) // checkListen has checked it
	ip, err := netip.ParseAddr(host)
	if err == nil && !ip.IsUnspecified() {
		return []string{addr}
	}
	return []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)}
}

// dialAny connects to the first address that answers.
func dialAny(ctx context.Context, network string, addrs []string) (conn net.Conn, err error) {
	var errs []error
	for _, a := range addrs {
		if conn, err = new(net.Dialer).DialContext(ctx, network, a); err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// pinnedTLSConfig returns a client configuration that trusts only the certificate in file. If
// the server still uses the certificate from before a renewal, it could not load the new one,
// and the check fails.
func pinnedTLSConfig(file string) (*tls.Config, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", unwrapPathError(err))
	}
	leaf, err := parseLeafCertificate(text)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return &tls.Config{RootCAs: roots, ServerName: certificateServerName(leaf)}, nil
}

// parseLeafCertificate returns the first certificate of a PEM file.
func parseLeafCertificate(text []byte) (*x509.Certificate, error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return nil, errors.New("contains no PEM certificate")
		}
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
	}
}

// certificateServerName returns a name for which the certificate is valid.
func certificateServerName(leaf *x509.Certificate) string {
	if len(leaf.DNSNames) > 0 {
		return strings.Replace(leaf.DNSNames[0], "*", "healthcheck", 1)
	}
	if len(leaf.IPAddresses) > 0 {
		return leaf.IPAddresses[0].String()
	}
	return leaf.Subject.CommonName
}

// backup copies the database to a new file, checks the copy, and prints what is in it. It
// removes a copy that fails the check.
func (p *program) backup(ctx context.Context, args []string) error {
	if len(args) != 1 || strings.HasPrefix(args[0], "-") {
		return errors.New("usage: llm-proxy backup FILE")
	}
	cfg, err := p.config()
	if err != nil {
		return err
	}
	name, err := filepath.Abs(args[0])
	if err != nil {
		return err
	}
	if cfg.postgres != nil {
		return errors.New("backup copies a SQLite file; make a backup of PostgreSQL with pg_dump (docs/operate.md)")
	}
	if _, err := os.Stat(cfg.databaseFile); err != nil {
		return fmt.Errorf("there is no database at %s: %w", cfg.databaseFile, unwrapPathError(err))
	}
	// SQLite writes to an existing empty file, so the file has our mode from the first byte.
	if err := writeNewFile(name, ""); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s already exists; choose another name", name)
	} else if err != nil {
		return fmt.Errorf("creating the backup: %w", err)
	}
	info, err := copyDatabase(ctx, cfg.databaseFile, name)
	if err != nil {
		return fmt.Errorf("%w; no backup was made", errors.Join(err, removeDatabase(name)))
	}
	fmt.Fprintf(p.stdout, "%s: %s\nThe backup is complete. To restore it, you need the encryption key with the id %s, "+
		"which is not in the backup.\n", name, info, info.keyID)
	return nil
}

// copyDatabase copies the database from to the empty file to, and inspects the copy.
func copyDatabase(ctx context.Context, from, to string) (*databaseInfo, error) {
	src, err := openReadOnly(from, false)
	if err != nil {
		return nil, err
	}
	defer src.close()
	if err := src.copyTo(ctx, to); err != nil {
		return nil, err
	}
	if err := dropCacheFrom(ctx, to); err != nil {
		return nil, err
	}
	if err := syncFile(to); err != nil {
		return nil, err
	}
	return inspectDatabase(ctx, to)
}

// audit verifies the audit trail. It returns an error if the trail is damaged.
func (p *program) audit(ctx context.Context, args []string) error {
	if len(args) == 0 || len(args) > 2 || args[0] != "verify" {
		return errors.New("usage: llm-proxy audit verify [SEQ:MAC]")
	}
	var expect *auditHead
	if len(args) == 2 {
		h, err := parseAuditHead(args[1])
		if err != nil {
			return err
		}
		expect = &h
	}
	cfg, err := loadConfigWith(p.getenv, func(string) error { return nil }) // the command writes nothing
	if err != nil {
		return fmt.Errorf("the configuration has problems:\n%w", err)
	}
	st, err := openToRead(ctx, cfg)
	if err != nil {
		return err
	}
	defer st.close()
	k, err := verifyAudit(ctx, cfg, st, expect)
	if err != nil {
		return err
	}
	foreign, n, err := verifyRows(ctx, cfg, st)
	if errors.Is(err, errRowsNotBound) {
		fmt.Fprintf(p.stdout, "Note: %v.\n", err)
	} else if err != nil {
		return err
	}
	if k.intact() {
		fmt.Fprintf(p.stdout, "The audit trail is intact: %s.\nIts end is %s\n"+
			"Keep that value elsewhere: pass it to this command later to prove that nothing up to there was "+
			"changed or removed.\n",
			k, k.lastHead)
		if notice := k.priorUseNotice(); notice != "" {
			fmt.Fprintln(p.stdout, notice)
		}
		return p.reportRows(foreign, n, cfg.databaseName)
	}
	_ = p.reportRows(foreign, n, cfg.databaseName) // the damaged trail is the error
	for _, line := range k.problems {
		fmt.Fprintln(p.stdout, line)
	}
	if k.omittedProblems > 0 {
		fmt.Fprintf(p.stdout, "and %d more problems\n", k.omittedProblems)
	}
	return fmt.Errorf("the audit trail is damaged: the first bad event is %d. Something other than this program "+
		"wrote to %s. "+
		"Keep a copy of it, compare the events from %d on with a backup (llm-proxy restore, to another DATA_DIR), "+
		"and find out who can write to that file",
		k.firstProblemSeq, cfg.databaseName, k.firstProblemSeq)
}

// reportRows prints the rows that verifyRows found, and returns an error if there are any.
func (p *program) reportRows(foreign []string, n int, file string) error {
	if n == 0 {
		return nil
	}
	for _, line := range foreign {
		fmt.Fprintln(p.stdout, line)
	}
	return fmt.Errorf("%s that grant rights are refused, because something other than this program wrote to %s. "+
		"Revoke or delete them and create new ones, or restore a backup, and find out who can write to that file",
		countNoun(int64(n), "row"), file)
}

// verifyRows checks every row that grants something, after verifyAudit. It returns descriptions of the first that
// are refused, and how many there are; errRowsNotBound before the first start with this version.
func verifyRows(ctx context.Context, cfg *config, st *store) (problems []string, n int, err error) {
	version, supported, err := st.schemaVersion(ctx)
	if err != nil {
		return nil, 0, err
	}
	if version < supported {
		return nil, 0, errRowsNotBound
	}
	sl, err := openExistingSealer(ctx, cfg, st)
	if err != nil {
		return nil, 0, err
	}
	bound, err := st.rowsAreBound(ctx, sl)
	if err == nil && !bound {
		err = errRowsNotBound
	}
	if err != nil {
		return nil, 0, err
	}
	if st.chain, err = st.loadAuditChain(ctx, sl); err != nil {
		return nil, 0, err
	}
	return st.foreignRows(ctx, maxAuditProblems)
}

// verifyAudit checks the audit trail of a database, with the key from the settings.
func verifyAudit(ctx context.Context, cfg *config, st *store, expect *auditHead) (*auditCheck, error) {
	version, supported, err := st.schemaVersion(ctx)
	if err != nil {
		return nil, err
	}
	if version > supported {
		return nil, fmt.Errorf("the database is from a newer llm-proxy (schema %d; this one supports %d); use that one",
			version, supported)
	}
	if version < auditSchemaVersion && st.backend == nil {
		return nil, errNoAuditTrail
	}
	sl, err := openExistingSealer(ctx, cfg, st)
	if err != nil {
		return nil, err
	}
	chain, err := st.loadAuditChain(ctx, sl)
	if errors.Is(err, errNotFound) {
		return nil, errors.New("the key of the audit trail was removed from the database, so no event can be " +
			"verified; " +
			"restore a backup with llm-proxy restore FILE")
	}
	if err != nil {
		return nil, err
	}
	return st.verifyAudit(ctx, chain, expect)
}

var errRowsNotBound = errors.New("rows that grant rights are not checked before the next start of the server, which " +
	"migrates the database and binds them")

var errNoAuditTrail = errors.New("the database is from a version without an audit trail; the next start of the " +
	"server creates it")

// openToRead opens the database for reading. A server may have it open.
func openToRead(ctx context.Context, cfg *config) (*store, error) {
	if cfg.postgres == nil {
		return openExistingReadOnly(ctx, cfg.databaseFile)
	}
	st, err := openPostgres(ctx, cfg.postgres, false)
	if err != nil {
		return nil, err
	}
	if version, _, err := st.schemaVersion(ctx); version == 0 || err != nil {
		return nil, errors.Join(fmt.Errorf("there is no database of this program at %s", cfg.databaseName), err,
			st.close())
	}
	return st, nil
}

// openExistingReadOnly opens a SQLite database for reading. A server may have it open. On a read-only
// medium, SQLite opens it only if told that nobody writes to it.
func openExistingReadOnly(ctx context.Context, file string) (*store, error) {
	if info, err := os.Stat(file); err != nil || info.Size() == 0 {
		return nil, fmt.Errorf("there is no database at %s; check DATA_DIR and DATABASE_URL", file)
	}
	st, err := openReadOnly(file, false)
	if err != nil {
		return nil, err
	}
	if _, _, err = st.schemaVersion(ctx); err == nil {
		return st, nil
	}
	st.close()
	if _, statErr := os.Stat(file + "-wal"); !errors.Is(statErr, fs.ErrNotExist) {
		return nil, err
	}
	return openReadOnly(file, true)
}

// removeDatabase removes a database file and the files that SQLite may have put beside it.
func removeDatabase(name string) error {
	var errs []error
	for _, suffix := range []string{"-wal", "-shm", "-journal", ""} {
		if err := os.Remove(name + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// A databaseInfo describes a database that was inspected.
type databaseInfo struct {
	rowCounts
	bytes    int64
	keyCheck string // the setting key_check
	keyID    string
}

func (d *databaseInfo) String() string {
	s := fmt.Sprintf("%.1f MiB; %s, %s, %s", float64(d.bytes)/(1<<20),
		countNoun(d.projects, "project"), countNoun(d.tokens, "token"), countNoun(d.calls, "call"))
	if d.newestCall > 0 {
		s += ", the latest at " + time.UnixMilli(d.newestCall>>idTimeShift).UTC().Format(time.RFC3339)
	}
	return s
}

// countNoun returns a number with its noun: "1 token", "2 tokens".
func countNoun(n int64, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

// inspectDatabase checks a database file that nobody has open: it must be undamaged, not newer
// than this program, and a database of llm-proxy.
func inspectDatabase(ctx context.Context, name string) (*databaseInfo, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("inspecting the copy: %w", err)
	}
	st, err := openReadOnly(name, true)
	if err != nil {
		return nil, err
	}
	defer st.close()
	version, supported, err := st.schemaVersion(ctx)
	if err != nil {
		return nil, err
	}
	if version > supported {
		return nil, fmt.Errorf("it is from a newer llm-proxy (schema %d; this one supports %d); use that one", version,
			supported)
	}
	problems, err := st.checkIntegrity(ctx)
	if err != nil {
		return nil, err
	}
	if len(problems) > 0 {
		return nil, fmt.Errorf("it is damaged: %s", clip(strings.Join(problems, "; "), 500))
	}
	f := &databaseInfo{bytes: info.Size()}
	if f.keyCheck, err = st.setting(ctx, keyCheckSetting); version == 0 || err != nil {
		return nil, errors.Join(errors.New("it is not a database of llm-proxy"), err)
	}
	sealed, err := base64.StdEncoding.DecodeString(f.keyCheck)
	if err != nil {
		return nil, fmt.Errorf("reading its key check: %w", err)
	}
	f.keyID = keyID(sealed)
	f.rowCounts, err = st.countRows(ctx)
	return f, err
}

// showPrice prints the price of a model: the operator's own, if there is a database that has one, or the list price.
func (p *program) showPrice(ctx context.Context, args []string) error {
	if len(args) == 0 || len(args) > 2 {
		return errors.New("usage: llm-proxy prices MODEL [PROVIDER]")
	}
	model, vendor := args[0], strings.Join(args[1:], "")
	cfg, err := loadConfigWith(p.getenv, func(string) error { return nil }) // the command writes nothing
	if err != nil {
		return fmt.Errorf("the configuration has problems:\n%w", err)
	}
	table, err := loadPrices()
	if err != nil {
		return err
	}
	if _, statErr := os.Stat(cfg.databaseFile); statErr == nil || cfg.postgres != nil {
		st, err := openToRead(ctx, cfg)
		if err != nil {
			return err
		}
		defer st.close()
		if table, err = effectivePrices(ctx, st); err != nil {
			return err
		}
	}
	price := table.lookup(vendor, model, time.Now().UnixMilli())
	if price == nil {
		return fmt.Errorf("%s has no price; set one with POST /manage/prices", clip(model, 256))
	}
	fmt.Fprint(p.stdout, price.describe())
	return nil
}

// takeNewKey replaces a provider key that was changed since, because the old one may have leaked. If all keys were
// encrypted with another encryption key since, the new one cannot be read with the backup's: an upstream whose key
// has another hint becomes inactive then.
func (u *upstreamRow) takeNewKey(c *upstreamRow) (rotated bool) {
	if bytes.Equal(u.sealedKey, c.sealedKey) || len(c.sealedKey) == 0 {
		return false
	}
	if keyID(u.sealedKey) == keyID(c.sealedKey) {
		u.sealedKey, u.keyHint, u.baseURL = c.sealedKey, c.keyHint, c.baseURL // sealed for the URL's host
		u.organization, u.openaiProject = c.organization, c.openaiProject
		return true
	}
	rotated = u.keyHint != c.keyHint
	u.active = u.active && !rotated
	return rotated
}

// narrowUse narrows with whom an upstream is shared, for which models it is used, and its limits.
func (u *upstreamRow) narrowUse(c *upstreamRow) (narrower bool, err error) {
	var shared, sharedNow, models, modelsNow []string
	var settings, settingsNow upstreamSettings
	for _, f := range []struct {
		text   string
		target any
	}{{u.sharedWith, &shared}, {c.sharedWith, &sharedNow}, {u.models, &models}, {c.models, &modelsNow},
		{u.settings, &settings}, {c.settings, &settingsNow}} {
		if err := json.Unmarshal([]byte(f.text), f.target); err != nil {
			return false, err
		}
	}
	if n := len(shared); n > 0 {
		shared = slices.DeleteFunc(shared, func(id string) bool { return !slices.Contains(sharedNow, id) })
		narrower = len(shared) < n
	}
	if len(modelsNow) > 0 { // an empty list means all models
		both := modelsNow
		if len(models) > 0 {
			both = intersectLists(models, modelsNow, intersectPatterns)
		}
		narrower = narrower || !slices.Equal(both, models)
		if models = both; len(both) == 0 {
			u.active = false
		}
	}
	for _, l := range []struct{ limit, now *int64 }{
		{&settings.RequestsPerMinute, &settingsNow.RequestsPerMinute},
		{&settings.TokensPerMinute, &settingsNow.TokensPerMinute},
	} {
		if *l.now > 0 && (*l.limit == 0 || *l.now < *l.limit) {
			*l.limit, narrower = *l.now, true
		}
	}
	if narrower {
		u.sharedWith, u.models = string(mustMarshal(append([]string{}, shared...))), string(mustMarshal(models))
		u.settings = settings.String()
	}
	return narrower, nil
}

// isLower reports whether a is below b. nil is no limit.
func isLower(a, b *int64) bool { return a != nil && (b == nil || *a < *b) }

// lower returns the lower of two limits, and whether that is b because it is below a.
func lower(a, b *int64) (*int64, bool) {
	if isLower(b, a) {
		return b, true
	}
	return a, false
}

// narrowPolicy returns the text of a policy that allows what both policies allow: the backup's text if that is
// the same as in the backup. widened reports whether the current policy allows more than the result.
func narrowPolicy(backup, current string, ofProject bool) (text string, widened bool, err error) {
	if backup == current {
		return backup, false, nil
	}
	b, err := parsePolicy([]byte(backup), ofProject)
	if err != nil {
		return "", false, err
	}
	c, err := parsePolicy([]byte(current), ofProject)
	if err != nil {
		return "", false, err
	}
	both := b.intersect(&c)
	widened = both.String() != c.String()
	if both.String() == b.String() {
		return backup, widened, nil
	}
	return both.String(), widened, nil
}

// intersect returns a policy that allows what both p and now allow. Where that would have more entries than a
// policy may, it has now's.
func (p *policy) intersect(now *policy) policy {
	return policy{
		Endpoints:       intersectLists(p.Endpoints, now.Endpoints, intersectEndpoints),
		Models:          intersectLists(p.Models, now.Models, intersectPatterns),
		Addresses:       intersectLists(p.Addresses, now.Addresses, intersectNetworks),
		Limits:          lowerLimits(p.Limits, now.Limits),
		Stateful:        p.Stateful && now.Stateful,
		KeepContentDays: min(p.KeepContentDays, now.KeepContentDays),
		Cache:           p.Cache.narrowed(now.Cache),
		Attribution:     p.Attribution.narrowed(now.Attribution),
	}
}

// intersectLists returns what both lists allow; a nil list allows everything. both returns what an entry of each
// list allow together, and false if that is nothing.
func intersectLists[T comparable](backup, now []T, both func(a, b T) (T, bool)) []T {
	if backup == nil || now == nil || slices.Equal(backup, now) {
		if backup == nil {
			return now
		}
		return backup
	}
	out := []T{}
	for _, a := range backup {
		for _, b := range now {
			if e, ok := both(a, b); ok && !slices.Contains(out, e) {
				out = append(out, e)
			}
		}
	}
	if len(out) > maxPolicyEntries {
		return now
	}
	return out
}

// intersectPatterns returns the pattern of what two patterns both match: the longer one, if the other matches it.
func intersectPatterns(a, b string) (string, bool) {
	if matchesPattern(a, b) {
		return b, true
	}
	return a, matchesPattern(b, a)
}

// intersectEndpoints is intersectPatterns for endpoints, each with or without a method.
func intersectEndpoints(a, b string) (string, bool) {
	methodA, pathA := splitEndpoint(a)
	methodB, pathB := splitEndpoint(b)
	path, ok := intersectPatterns(pathA, pathB)
	switch {
	case !ok || methodA != "" && methodB != "" && methodA != methodB:
		return "", false
	case methodA == "":
		methodA = methodB
	}
	return strings.TrimPrefix(methodA+" "+path, " "), true
}

func splitEndpoint(entry string) (method, path string) {
	if method, path, ok := strings.Cut(entry, " "); ok {
		return method, path
	}
	return "", entry
}

func intersectNetworks(a, b netip.Prefix) (netip.Prefix, bool) {
	if a.Bits() > b.Bits() {
		return a, a.Overlaps(b)
	}
	return b, a.Overlaps(b)
}

// lowerLimits returns the limits of both lists. Of two that count the same calls, it has the lower.
func lowerLimits(backup, now []limit) []limit {
	out := slices.Clone(backup)
	for _, l := range now {
		i := slices.IndexFunc(out, func(o limit) bool { return o.key() == l.key() })
		if i < 0 {
			out = append(out, l)
		} else {
			out[i].max, out[i].maxValues = min(out[i].max, l.max), min(out[i].maxValues, l.maxValues)
		}
	}
	if len(out) > maxLimits {
		return now
	}
	return out
}
