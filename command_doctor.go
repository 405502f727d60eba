// This file is `llm-proxy doctor`: it checks everything that a server needs and prints one
// line per check, with what to do about a problem. It may run beside a server: it only reads,
// takes no lock, and calls providers only if asked to. It may not print a secret.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A diagnosis is one run of the doctor.
type diagnosis struct {
	out    io.Writer
	cfg    *config
	getenv func(string) string
	now    time.Time
	failed int
}

func (d *diagnosis) ok(what, finding string) { fmt.Fprintf(d.out, "ok    %s: %s\n", what, finding) }

func (d *diagnosis) warn(what, finding, remedy string) {
	fmt.Fprintf(d.out, "warn  %s: %s; %s\n", what, finding, remedy)
}

func (d *diagnosis) fail(what, finding, remedy string) {
	d.failed++
	fmt.Fprintf(d.out, "FAIL  %s: %s; %s\n", what, finding, remedy)
}

func (p *program) doctor(ctx context.Context, args []string) error {
	if len(args) > 1 || len(args) == 1 && args[0] != "--provider" {
		return errors.New("usage: llm-proxy doctor [--provider]")
	}
	d := &diagnosis{out: p.stdout, getenv: p.getenv, now: time.Now()}
	var err error
	if d.cfg, err = loadConfig(p.getenv); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			d.fail("configuration", line, "fix it, then run doctor again for the other checks")
		}
	} else {
		d.ok("configuration", "valid")
		for _, n := range d.cfg.settingNotices(p.environment) {
			d.warn("configuration", n.finding, n.remedy)
		}
		d.runChecks(ctx, len(args) == 1)
	}
	if d.failed > 0 {
		return fmt.Errorf("%d of the checks failed", d.failed)
	}
	return nil
}

// runChecks makes every check except the one of the configuration.
func (d *diagnosis) runChecks(ctx context.Context, provider bool) {
	d.checkClock()
	d.checkCertificate()
	if _, err := os.Stat(d.cfg.dataDir); errors.Is(err, fs.ErrNotExist) {
		d.warn("data directory", d.cfg.dataDir+" does not exist",
			"the first start creates it; if there was one, check DATA_DIR")
		return
	}
	d.checkFileModes()
	d.checkDisk()
	st := d.openDatabase(ctx)
	if st == nil {
		return
	}
	defer st.close()
	if !d.checkDatabase(ctx, st) {
		return
	}
	d.checkReplicas(ctx, st)
	d.checkOpenCalls(ctx, st)
	d.checkUnrecorded(ctx, st)
	sl, err := openExistingSealer(ctx, d.cfg, st)
	if err != nil {
		d.fail("encryption key", err.Error(), "without it no provider key can be used")
		return
	}
	d.ok("encryption key", "opens this database (id "+sl.id()+")")
	d.checkAuditTrail(ctx, st)
	d.checkRows(ctx, st)
	d.checkUpstreams(ctx, st, sl, provider)
}

// openDatabase opens the database for reading, or reports why not and returns nil.
func (d *diagnosis) openDatabase(ctx context.Context) *store {
	if d.cfg.postgres != nil {
		for _, w := range d.cfg.databaseWarnings {
			d.warn("database", w, "set sslmode=verify-full in DATABASE_URL")
		}
		st, err := openPostgres(ctx, d.cfg.postgres, false)
		if err != nil {
			d.fail("database", err.Error(), "check DATABASE_URL, the password, and the server")
			return nil
		}
		if version, _, err := st.schemaVersion(ctx); err == nil && version == 0 {
			d.warn("database", d.cfg.databaseName+" is empty", "the first start creates its tables")
			_ = st.close()
			return nil
		}
		return st
	}
	if info, err := os.Stat(d.cfg.databaseFile); err != nil || info.Size() == 0 {
		d.warn("database", d.cfg.databaseFile+" is missing or empty",
			"the first start creates it; if there was one, restore it with llm-proxy restore FILE")
		return nil
	}
	st, err := openReadOnly(d.cfg.databaseFile, false)
	if err != nil {
		d.fail("database", err.Error(), "restore a backup with llm-proxy restore FILE")
		return nil
	}
	return st
}

// checkClock finds clocks that were never set, because tokens expire by the clock.
func (d *diagnosis) checkClock() {
	if y := d.now.Year(); y < 2025 || y > 2100 {
		d.fail("clock", "it shows "+d.now.UTC().Format(time.RFC3339),
			"set the clock of this machine: tokens expire by it")
		return
	}
	d.ok("clock", d.now.UTC().Format(time.RFC3339))
}

func (d *diagnosis) checkCertificate() {
	if d.cfg.tlsCert == "" {
		return
	}
	const what = "TLS certificate"
	pair, err := tls.LoadX509KeyPair(d.cfg.tlsCert, d.cfg.tlsKey)
	if err != nil {
		d.fail(what, "cannot be used: "+unwrapPathError(err).Error(), "check TLS_CERT_FILE and TLS_KEY_FILE")
		return
	}
	switch until := pair.Leaf.NotAfter; {
	case d.now.After(until):
		d.fail(what, "expired on "+until.UTC().Format(time.DateOnly), "renew it and restart the server")
	case d.now.Before(pair.Leaf.NotBefore):
		d.fail(what, "is not valid before "+pair.Leaf.NotBefore.UTC().Format(time.RFC3339),
			"check the clock and the certificate")
	case until.Sub(d.now) < 14*24*time.Hour:
		d.warn(what, "expires on "+until.UTC().Format(time.DateOnly), "renew it and restart the server")
	default:
		d.ok(what, "valid until "+until.UTC().Format(time.DateOnly))
	}
}

// checkFileModes finds files that other users of this machine can read.
func (d *diagnosis) checkFileModes() {
	before := d.failed
	for _, name := range []string{d.cfg.databaseFile, d.cfg.databaseFile + "-wal", d.cfg.databaseFile + "-shm",
		filepath.Join(d.cfg.dataDir, keyFileName), filepath.Join(d.cfg.dataDir, lockFileName)} {
		if info, err := os.Stat(name); err == nil && info.Mode().Perm()&0o077 != 0 {
			d.fail("file modes", fmt.Sprintf("%s has mode %04o: other users can read or write it", name,
				info.Mode().Perm()),
				"chmod 600 "+name)
		}
	}
	for _, setting := range []string{"ENCRYPTION_KEY_FILE", "MANAGEMENT_TOKEN_FILE", "TLS_KEY_FILE",
		"DATABASE_PASSWORD_FILE"} {
		name := d.getenv(setting)
		if info, err := os.Stat(name); name != "" && err == nil && info.Mode().Perm()&0o007 != 0 {
			d.warn("file modes", fmt.Sprintf("%s names a file with mode %04o: every user can read it", setting,
				info.Mode().Perm()),
				"remove that permission")
		}
	}
	if info, err := os.Stat(d.cfg.dataDir); err == nil && info.Mode().Perm()&0o077 != 0 {
		d.warn("file modes", fmt.Sprintf("%s has mode %04o", d.cfg.dataDir, info.Mode().Perm()),
			"chmod 700 "+d.cfg.dataDir)
	} else if d.failed == before {
		d.ok("file modes", "only the owner can read the data directory")
	}
}

func (d *diagnosis) checkDisk() {
	for _, dir := range slices.Compact([]string{d.cfg.dataDir, filepath.Dir(d.cfg.unwrittenFile())}) {
		d.checkFreeSpace(dir, freeSpace)
	}
}

func (d *diagnosis) checkFreeSpace(dir string, free func(string) (uint64, error)) {
	n, err := free(dir)
	finding := fmt.Sprintf("%d MiB free in %s", n>>20, dir)
	switch {
	case err != nil:
		d.warn("disk", "cannot find the free space in "+dir+": "+err.Error(), "check with df")
	case n < 100<<20:
		d.fail("disk", finding, "free some space: without it calls are refused")
	case n < 1<<30:
		d.warn("disk", finding, "free some space, or shorten RETENTION")
	default:
		d.ok("disk", finding)
	}
}

// checkDatabase reports whether the database can be used for further checks.
func (d *diagnosis) checkDatabase(ctx context.Context, st *store) bool {
	const remedy = "restore a backup with llm-proxy restore FILE; the damaged file is kept"
	version, supported, err := st.schemaVersion(ctx)
	if err != nil {
		d.fail("database", err.Error(), remedy)
		return false
	}
	switch {
	case version > supported:
		d.fail("database", fmt.Sprintf("schema %d is newer than this program, which supports %d", version, supported),
			"use the newer llm-proxy")
		return false
	case version > 0 && version < supported:
		d.warn("database", fmt.Sprintf("schema %d is older than this program's %d", version, supported),
			"the next start migrates it; make a backup first")
	}
	problems, err := st.checkIntegrity(ctx)
	if err != nil {
		problems = append(problems, err.Error())
	}
	if len(problems) > 0 {
		d.fail("database", "damaged: "+clip(strings.Join(problems, ", "), 500), remedy)
		return false
	}
	differences, err := st.schemaDifferences(ctx, version)
	if err != nil {
		d.fail("database", err.Error(), remedy)
		return false
	}
	if len(differences) > 0 {
		d.fail("database", describeSchemaProblems(differences, version).Error(), "the server does not start with it")
		if version == 0 {
			return false
		}
	}
	rows, err := st.countRows(ctx)
	if err != nil {
		d.fail("database", err.Error(), remedy)
		return false
	}
	if len(differences) == 0 {
		d.ok("database", fmt.Sprintf("intact, schema %d, %s, %s, %s", version,
			countNoun(rows.projects, "project"), countNoun(rows.tokens, "token"), countNoun(rows.calls, "call")))
	}
	if newest := time.UnixMilli(rows.newestCall >> idTimeShift); newest.After(d.now.Add(time.Minute)) {
		d.warn("clock", "it is behind the latest call on record, at "+newest.UTC().Format(time.RFC3339),
			"check the clock of this machine")
	}
	return true
}

// checkReplicas looks at the processes that serve with a PostgreSQL database.
func (d *diagnosis) checkReplicas(ctx context.Context, st *store) {
	const what = "replicas"
	if version, supported, err := st.schemaVersion(ctx); st.backend == nil || err == nil && version < supported {
		return
	}
	ops := &operations{store: st}
	replicas, err := ops.listReplicas(ctx)
	if err != nil {
		d.fail(what, err.Error(), "see the database check")
		return
	}
	leads, found := false, false
	for _, r := range replicas {
		name := fmt.Sprintf("%d (%s)", r.ID, r.Address)
		leads = leads || r.Leader
		warn := func(what, finding, remedy string) {
			found = true
			d.warn(what, finding, remedy)
		}
		switch offset := max(r.OffsetMS, -r.OffsetMS); {
		case r.State == "closed":
			warn(what, name+" has died, and its calls are not yet recorded as lost",
				"a running server does that within seconds; otherwise the next start does")
		case r.State == "silent":
			warn(what, fmt.Sprintf("%s has sent no heartbeat for %d s", name, r.HeartbeatMS/1000),
				"if it has ended, another one closes it after REPLICA_TIMEOUT")
		case offset > time.Minute.Milliseconds():
			warn("clock", fmt.Sprintf("that of replica %s is %d s off the database's", name, offset/1000),
				"set it: tokens expire by it")
		case r.Version != versionText():
			warn(what, name+" runs "+r.Version, "end the upgrade: all replicas should have one version")
		}
	}
	if !found && len(replicas) > 0 && !leads {
		d.warn(what, "none of them leads", "look at their logs: one of them should within seconds")
	} else if !found {
		d.ok(what, countNoun(int64(len(replicas)), "process")+" serving")
	}
}

// checkOpenCalls counts calls that have not ended. A running server has some.
func (d *diagnosis) checkOpenCalls(ctx context.Context, st *store) {
	const what = "open calls"
	if version, supported, err := st.schemaVersion(ctx); err == nil && version < supported {
		d.ok(what, "not checked before the database is migrated")
		return
	}
	n, err := st.countRunning(ctx, minIDAt(d.now))
	if err != nil {
		d.fail(what, err.Error(), "see the database check")
		return
	}
	old, err := st.countRunning(ctx, minIDAt(d.now.Add(-24*time.Hour)))
	switch {
	case err != nil:
		d.fail(what, err.Error(), "see the database check")
	case old > 0:
		d.warn(what, fmt.Sprintf("%d have been open for more than a day", old),
			"if no server is running, the next start records them as lost, with estimated usage")
	default:
		d.ok(what, fmt.Sprintf("%d not finished yet", n))
	}
}

// checkUnrecorded finds calls that the database did not take.
func (d *diagnosis) checkUnrecorded(ctx context.Context, st *store) {
	const what = "ledger"
	refusal, err := st.setting(ctx, ledgerRefusal)
	if err != nil && !errors.Is(err, errNotFound) {
		d.fail(what, err.Error(), "see the database check")
		return
	}
	if refusal != "" {
		d.fail(what, "the database refuses the rows of calls since "+refusal,
			"calls get 503 until it takes them: undo what was changed in the database, such as a trigger")
	}
	name := d.cfg.unwrittenFile()
	lines, err := os.ReadFile(name)
	switch rows := bytes.Count(lines, []byte{'\n'}); {
	case err == nil:
		d.warn(what, fmt.Sprintf("%s has %s that the database has not taken yet", name,
			countNoun(int64(rows), "call")), "a running server records them once it can, otherwise the next start does")
	case !errors.Is(err, fs.ErrNotExist):
		d.fail(what, "cannot be read: "+unwrapPathError(err).Error(), "check the owner and the mode of "+name)
	case refusal == "":
		d.ok(what, "every call that has ended is in the database")
	}
}

// checkAuditTrail verifies the audit trail.
func (d *diagnosis) checkAuditTrail(ctx context.Context, st *store) {
	const what, remedy = "audit trail", "run llm-proxy audit verify for details"
	k, err := verifyAudit(ctx, d.cfg, st, nil)
	switch {
	case errors.Is(err, errNoAuditTrail):
		d.warn(what, "there is none yet", "the next start of the server creates it")
	case err != nil:
		d.fail(what, err.Error(), remedy)
	case !k.intact():
		d.fail(what, fmt.Sprintf("changed or removed from event %d on", k.firstProblemSeq), remedy)
	default:
		d.ok(what, "intact, "+k.String())
	}
}

// checkRows finds tokens, keys and the like that something other than this program wrote.
func (d *diagnosis) checkRows(ctx context.Context, st *store) {
	const what, remedy = "rows", "run llm-proxy audit verify for details"
	problems, n, err := verifyRows(ctx, d.cfg, st)
	switch {
	case errors.Is(err, errRowsNotBound):
		d.ok(what, "not checked before the database is migrated")
	case err != nil:
		d.fail(what, err.Error(), remedy)
	case n > 0:
		d.fail(what, fmt.Sprintf("%s that grant rights are refused, such as: %s", countNoun(int64(n), "row"),
			problems[0]), remedy)
	default:
		d.ok(what, "no row that grants rights was changed outside this program")
	}
}

// checkUpstreams decrypts every provider key and, if provider is true, tries each key with its
// provider.
func (d *diagnosis) checkUpstreams(ctx context.Context, st *store, sl *sealer, provider bool) {
	if version, supported, err := st.schemaVersion(ctx); err == nil && version < supported {
		d.ok("provider keys", "not checked before the database is migrated")
		return
	}
	rows, err := allUpstreams(ctx, st)
	if err != nil {
		d.fail("provider keys", err.Error(), "see the database check")
		return
	}
	before := d.failed
	transport := newTransport(d.cfg.allowPrivate, d.cfg.upstreamProxy)
	defer transport.CloseIdleConnections()
	for i := range rows {
		row := &rows[i]
		what := "upstream " + row.id + " (" + row.name + ")"
		u := newUpstream(row, sl, d.cfg.allowPrivate, newHealthTracker())
		switch {
		case u.configErr != nil:
			d.fail(what, u.configErr.Error(),
				"correct it, and enter its key again: PATCH /manage/projects/"+row.projectID+"/upstreams/"+row.id)
		case provider && row.active:
			d.checkProvider(ctx, transport, what, u)
		}
	}
	if d.failed == before {
		d.ok("provider keys", fmt.Sprintf("%d, all can be decrypted", len(rows)))
	}
}

// allUpstreams returns the upstreams of every project.
func allUpstreams(ctx context.Context, st *store) (all []upstreamRow, err error) {
	var after int64
	for {
		projects, err := st.listProjects(ctx, projectListQuery{afterSeq: after, limit: 500})
		if err != nil || len(projects) == 0 {
			return all, err
		}
		for _, p := range projects {
			after = p.seq
			rows, err := st.projectUpstreams(ctx, p.seq)
			if err != nil {
				return nil, err
			}
			all = append(all, rows...)
		}
	}
}

// checkProvider asks a provider for its list of models, which costs nothing. It prints only
// the kind of answer, because the provider's text may contain the key.
func (d *diagnosis) checkProvider(ctx context.Context, transport http.RoundTripper, what string, u *upstream) {
	switch t := newKeyTester(transport).send(ctx, u); {
	case t.result == keyTestUnreachable:
		d.fail(what, "unreachable, or no answer in 10 s",
			"check the base URL, DNS, the firewall and the provider's certificate")
	case t.status == http.StatusOK:
		d.ok(what, "the provider accepts the key")
	case t.result == keyTestRefused:
		d.fail(what, "key refused by the provider", "set a valid key with PATCH on its URL under /manage")
	default:
		d.warn(what, fmt.Sprintf("the provider answers %d to GET /models", t.status),
			"check the provider's status page; some providers have no such list")
	}
}
