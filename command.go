// This room has the commands that look at a server from outside: healthcheck
// asks it over HTTP, backup copies its database while it serves, audit verify
// reads the audit trail. None changes anything of the server's, and none needs
// it to stop.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
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
	"strings"
	"time"
)

// A program is what main gives to run: the outside world, replaceable in tests.
type program struct {
	getenv         func(string) string
	stdout, stderr io.Writer
	ready          func(addr net.Addr) // called when listening; may be nil
	hangups        chan os.Signal      // SIGHUP; nil: left to the system
}

const usageText = `llm-proxy: a transparent, secure proxy between client programs and LLM APIs.

  llm-proxy [serve]            serve, with settings from the environment
  llm-proxy demo               serve with a stand-in provider and sample data; nothing is kept
  llm-proxy doctor [--provider]  check configuration, key, database, disk; asked to, the providers too
  llm-proxy healthcheck        exit 0 if the server at LISTEN_ADDR answers
  llm-proxy backup FILE        write a consistent copy of the database, while serving or not
  llm-proxy restore FILE [--revoke=since|all|none]
                               put a backup in the database's place, with the server stopped
  llm-proxy audit verify [SEQ:MAC]
                               go through the audit trail and find what was changed or removed
  llm-proxy rekey [FILE]       change the encryption key, with the server stopped: to the one in FILE,
                               or to one that is made and takes the place of the key file
  llm-proxy version

Settings (environment variables), their defaults and what they do:

`

func (p *program) noArgs(args []string, do func() error) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q; see llm-proxy --help", clip(args[0], 64))
	}
	return do()
}

// config loads the configuration, or lists all that is wrong with it.
func (p *program) config() (*config, error) {
	cfg, err := loadConfig(p.getenv)
	if err != nil {
		return nil, fmt.Errorf("the configuration has problems:\n%w", err)
	}
	return cfg, nil
}

// healthcheck asks the server at LISTEN_ADDR whether it answers. It reads no
// secret and does not look at the other settings: what is wrong with them is
// the server's business.
func (p *program) healthcheck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	addr := settingText(p.getenv, "LISTEN_ADDR")
	if err := checkListen(addr); err != nil {
		return fmt.Errorf("LISTEN_ADDR: %w", err)
	}
	if addr == systemdListen {
		return errors.New("LISTEN_ADDR: systemd knows where the server listens; set it to that address for this command")
	}
	to := &url.URL{Scheme: "http", Host: "localhost", Path: "/healthz"}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		if path, ok := strings.CutPrefix(addr, unixPrefix); ok {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
		return dialAny(ctx, network, dialTargets(addr))
	}}
	if file := settingText(p.getenv, "TLS_CERT_FILE"); file != "" {
		to.Scheme = "https"
		var err error
		if transport.TLSClientConfig, err = pinnedTLSConfig(file); err != nil {
			return fmt.Errorf("TLS_CERT_FILE: %w", err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, to.String(), nil)
	if err != nil {
		return err
	}
	res, err := transport.RoundTrip(req) // no redirect is followed
	if err != nil {
		return fmt.Errorf("no answer from %s: %w", addr, err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the server at %s answers %d to /healthz", addr, res.StatusCode)
	}
	return nil
}

// dialTargets are the addresses under which this machine reaches what listens
// on addr.
func dialTargets(addr string) []string {
	host, port, _ := net.SplitHostPort(addr) // checked before
	ip, err := netip.ParseAddr(host)
	if err == nil && !ip.IsUnspecified() {
		return []string{addr}
	}
	return []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)}
}

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

// pinnedTLSConfig returns a client's configuration that believes the certificate in
// file and no other. A server that goes on showing one from before the file was
// renewed is therefore not healthy: it could not read the new one.
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
			return nil, errors.New("holds no certificate in PEM")
		}
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
	}
}

// certificateServerName returns a name that the certificate is good for.
func certificateServerName(leaf *x509.Certificate) string {
	if len(leaf.DNSNames) > 0 {
		return strings.Replace(leaf.DNSNames[0], "*", "healthcheck", 1)
	}
	if len(leaf.IPAddresses) > 0 {
		return leaf.IPAddresses[0].String()
	}
	return leaf.Subject.CommonName
}

// backup copies the database to a new file, proves the copy good, and says what
// it is worth. A copy that is not good does not stay.
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
	if _, err := os.Stat(cfg.databaseFile); err != nil {
		return fmt.Errorf("there is no database at %s: %w", cfg.databaseFile, unwrapPathError(err))
	}
	// SQLite fills a file that is there and empty; so its mode is ours from the
	// first byte on.
	if err := writeNewFile(name, ""); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already; name a file that is not", name)
	} else if err != nil {
		return fmt.Errorf("making the backup: %w", err)
	}
	facts, err := copyDatabase(ctx, cfg.databaseFile, name)
	if err != nil {
		return fmt.Errorf("%w; no backup was made", errors.Join(err, removeDatabase(name)))
	}
	fmt.Fprintf(p.stdout, "%s: %s\nIt is whole. To restore it, the encryption key with the id %s is needed, which is not in it.\n",
		name, facts, facts.keyID)
	return nil
}

// copyDatabase copies the database from to the empty file to, and examines the
// copy.
func copyDatabase(ctx context.Context, from, to string) (*databaseInfo, error) {
	src, err := openReadOnly(from, false)
	if err != nil {
		return nil, err
	}
	defer src.close()
	if err := src.copyTo(ctx, to); err != nil {
		return nil, err
	}
	if err := syncFile(to); err != nil {
		return nil, err
	}
	return inspectDatabase(ctx, to)
}

// audit goes through the audit trail, and fails if it is not as it was written.
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
	cfg, err := loadConfigWith(p.getenv, func(string) error { return nil }) // nothing is written
	if err != nil {
		return fmt.Errorf("the configuration has problems:\n%w", err)
	}
	st, err := openExistingReadOnly(ctx, cfg.databaseFile)
	if err != nil {
		return err
	}
	defer st.close()
	k, err := verifyAudit(ctx, cfg, st, expect)
	if err != nil {
		return err
	}
	if k.intact() {
		fmt.Fprintf(p.stdout, "The audit trail is whole: %s.\nIts end is %s\n"+
			"Note that elsewhere: given to this command later, it proves that nothing up to there was changed or removed.\n", k, k.lastHead)
		if used := k.priorUseNotice(); used != "" {
			fmt.Fprintln(p.stdout, used)
		}
		return nil
	}
	for _, line := range k.problems {
		fmt.Fprintln(p.stdout, line)
	}
	if k.omittedProblems > 0 {
		fmt.Fprintf(p.stdout, "and %d more problems\n", k.omittedProblems)
	}
	return fmt.Errorf("the audit trail is not as it was written: the first bad entry is %d. Somebody wrote to %s who is not this program. "+
		"Keep a copy of it, compare entries from %d on with a backup (llm-proxy restore, to another DATA_DIR), and look at who can write to that file",
		k.firstProblemSeq, cfg.databaseFile, k.firstProblemSeq)
}

// verifyAudit checks the trail in a database, with the key from the settings.
func verifyAudit(ctx context.Context, cfg *config, st *store, expect *auditHead) (*auditCheck, error) {
	at, known, err := st.schemaVersion(ctx)
	if err != nil {
		return nil, err
	}
	if at > known {
		return nil, fmt.Errorf("the database is of a newer llm-proxy (schema %d, this one knows %d); use that one", at, known)
	}
	if at < auditSchemaVersion {
		return nil, errNoAuditTrail
	}
	sl, err := openExistingSealer(ctx, cfg, st)
	if err != nil {
		return nil, err
	}
	chain, err := st.loadAuditChain(ctx, sl)
	if errors.Is(err, errNotFound) {
		return nil, errors.New("the key of the audit trail was removed from the database, so that no entry can be verified; bring back a backup with llm-proxy restore FILE")
	}
	if err != nil {
		return nil, err
	}
	return st.verifyAudit(ctx, chain, expect)
}

var errNoAuditTrail = errors.New("the database is from before the audit trail, which begins with the next start of the server")

// openExistingReadOnly opens a database to look at: one that a server has open, or one on
// a medium where nothing can be written, which SQLite opens only if told that
// nobody writes.
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

// removeDatabase removes a database file and what SQLite may have put beside it.
func removeDatabase(name string) error {
	var errs []error
	for _, suffix := range []string{"-wal", "-shm", "-journal", ""} {
		if err := os.Remove(name + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// databaseInfo is what examine found out about a database.
type databaseInfo struct {
	rowCounts
	bytes    int64
	keyCheck string // the setting of this name
	keyID    string
}

func (f *databaseInfo) String() string {
	s := fmt.Sprintf("%.1f MiB; %d projects, %d tokens, %d calls", float64(f.bytes)/(1<<20), f.projects, f.tokens, f.calls)
	if f.newestCall > 0 {
		s += ", the newest of " + time.UnixMilli(f.newestCall>>idTimeShift).UTC().Format(time.RFC3339)
	}
	return s
}

// inspectDatabase looks into a database file that nobody has open. It must be whole,
// not newer than this program, and one of ours.
func inspectDatabase(ctx context.Context, name string) (*databaseInfo, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("looking at the copy: %w", err)
	}
	st, err := openReadOnly(name, true)
	if err != nil {
		return nil, err
	}
	defer st.close()
	at, known, err := st.schemaVersion(ctx)
	if err != nil {
		return nil, err
	}
	if at > known {
		return nil, fmt.Errorf("it is of a newer llm-proxy (schema %d, this one knows %d); use that one", at, known)
	}
	complaints, err := st.checkIntegrity(ctx)
	if err != nil {
		return nil, err
	}
	if len(complaints) > 0 {
		return nil, fmt.Errorf("it is damaged: %s", clip(strings.Join(complaints, "; "), 500))
	}
	f := &databaseInfo{bytes: info.Size()}
	if f.keyCheck, err = st.setting(ctx, "key_check"); at == 0 || err != nil {
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
