// This file has the commands that need the server stopped: restore replaces the database with a
// backup, rekey changes the encryption key.
//
// restore prepares and checks a copy first; after that it only renames files. It moves the
// previous database aside and never deletes it. A backup would make valid again what was revoked
// after it was made, so the operator has to choose what happens to that. With --revoke=since, the rows
// of the backup may grant no more than in the backup, and no more than in the current database.
//
// rekey decrypts everything with the old key and encrypts it with the new one, in one transaction.
// After a crash the database has one key or the other, and repeating the command finishes the change.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const restoreUsage = "usage: llm-proxy restore FILE [--revoke=since|all|none]"

// A restoration is one run of the command.
type restoration struct {
	cfg        *config
	backupFile string
	copyFile   string // the copy that will replace the database
	revokeMode string // since, all or none; "": not chosen
	backupInfo *databaseInfo
	now        time.Time
}

func (p *program) restore(ctx context.Context, args []string) error {
	r := &restoration{now: time.Now()}
	for _, a := range args {
		choice, ok := strings.CutPrefix(a, "--revoke=")
		switch {
		case ok && r.revokeMode == "" && checkOneOf(choice, "since", "all", "none") == nil:
			r.revokeMode = choice
		case !strings.HasPrefix(a, "-") && r.backupFile == "":
			r.backupFile = a
		default:
			return errors.New(restoreUsage)
		}
	}
	if r.backupFile == "" {
		return errors.New(restoreUsage)
	}
	var err error
	if r.cfg, err = p.config(); err != nil {
		return err
	}
	if r.cfg.postgres != nil {
		return errors.New("restore replaces a SQLite file; restore PostgreSQL with pg_restore (docs/operate.md)")
	}
	dir, err := lockDataDir(r.cfg)
	if err != nil {
		return err
	}
	defer dir.close()
	// This process has the lock, so no other uses this name. A crash may have left the file.
	r.copyFile = r.cfg.databaseFile + ".restoring"
	if err := removeDatabase(r.copyFile); err != nil {
		return fmt.Errorf("removing the copy that an earlier restore left: %w", err)
	}
	key, err := r.prepareCopy(ctx, p.stdout)
	if err != nil {
		return fmt.Errorf("%w; nothing was changed", errors.Join(err, removeDatabase(r.copyFile)))
	}
	aside, err := r.replaceDatabase()
	if err == nil {
		err = dir.recordDatabase()
	}
	if err != nil {
		return fmt.Errorf("replacing the database: %w; you can repeat this command (the previous database is %s)",
			err, cmp.Or(aside, r.cfg.databaseFile))
	}
	fmt.Fprintf(p.stdout, "The backup is restored: %s.\n", r.cfg.databaseFile)
	if aside != "" {
		fmt.Fprintf(p.stdout, "The previous database is %s. It contains encrypted keys, so delete it when you no "+
			"longer need it.\n", aside)
	}
	if key != nil {
		fmt.Fprintf(p.stdout, "All management keys are revoked. A new one (role admin), shown only once:\n\n  %s\n",
			key())
	}
	return nil
}

// prepareCopy makes the copy that will replace the database. It checks that the copy is
// undamaged and that the encryption key opens it, migrates it, and revokes what the operator
// chose. It returns a new management key if all of them were revoked.
func (r *restoration) prepareCopy(ctx context.Context, out io.Writer) (secret, error) {
	if err := r.copyBackup(); err != nil {
		return nil, err
	}
	var err error
	if r.backupInfo, err = inspectDatabase(ctx, r.copyFile); err != nil {
		return nil, fmt.Errorf("the backup %s cannot be used: %w", r.backupFile, err)
	}
	st, err := openStore(ctx, r.copyFile)
	if err != nil {
		return nil, err
	}
	key, err := r.applyRevokeMode(ctx, st, out)
	if err = errors.Join(err, st.close()); err != nil { // close empties the write-ahead log
		return nil, err
	}
	if _, err := os.Stat(r.copyFile + "-wal"); !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("the copy could not be finished: its write-ahead log is still there")
	}
	return key, syncFile(r.copyFile)
}

// copyBackup copies the backup next to the database. It rejects files that llm-proxy backup
// did not write.
func (r *restoration) copyBackup() error {
	info, err := os.Stat(r.backupFile)
	if err != nil {
		return fmt.Errorf("%s: %w", r.backupFile, unwrapPathError(err))
	}
	if current, err := os.Stat(r.cfg.databaseFile); err == nil && os.SameFile(info, current) {
		return fmt.Errorf("%s is the database itself", r.backupFile)
	}
	if wal, err := os.Stat(r.backupFile + "-wal"); err == nil && wal.Size() > 0 {
		return fmt.Errorf("%[1]s was copied while in use: part of it is in %[1]s-wal; only llm-proxy backup makes "+
			"complete copies",
			r.backupFile)
	}
	src, err := os.Open(r.backupFile)
	if err != nil {
		return fmt.Errorf("%s: %w", r.backupFile, unwrapPathError(err))
	}
	defer src.Close()
	dst, err := os.OpenFile(r.copyFile, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("copying the backup: %w", err)
	}
	_, err = io.Copy(dst, src)
	if err = errors.Join(err, dst.Close()); err != nil {
		return fmt.Errorf("copying the backup: %w", err)
	}
	return nil
}

// applyRevokeMode checks the encryption key, compares the backup with the current database,
// and revokes what the operator chose. Without a choice it explains the choices.
func (r *restoration) applyRevokeMode(ctx context.Context, st *store, out io.Writer) (secret, error) {
	sl, err := openExistingSealer(ctx, r.cfg, st)
	if err != nil {
		return nil, fmt.Errorf("%w (the backup needs the key with the id %s)", err, r.backupInfo.keyID)
	}
	by := systemOrigin(r.now)
	if err := errors.Join(st.openAudit(ctx, sl, by), st.endAllSessions(ctx), st.clearCache(ctx)); err != nil {
		return nil, err
	}
	fmt.Fprintf(out, "The backup is intact: %s.\n", r.backupInfo)
	plan, impact, compared := r.compareWithCurrent(ctx, st, out)
	event := auditEvent{actionRestore, "", []auditField{
		{"revoke", r.revokeMode}, {"audit_head_before", st.attachedAuditHead(ctx)},
	}}
	switch r.revokeMode {
	case "none":
		return nil, st.execAudited(ctx, by, event, nil)
	case "since":
		if !compared {
			return nil, errors.New("--revoke=since needs a current database to compare with; use --revoke=all or " +
				"--revoke=none")
		}
		event.detail = append(event.detail, plan.auditFields()...)
		return nil, st.applyNarrowing(ctx, by, event, plan)
	case "all":
		if err := st.revokeAll(ctx, by, event); err != nil || r.cfg.managementToken != nil {
			return nil, err
		}
		return (&operations{store: st, fields: newFieldTables()}).createFirstKey(ctx)
	}
	fmt.Fprint(out, "\nWhat was revoked, rotated, deleted or narrowed after the backup was made would become valid "+
		"again.\n"+
		"Choose what to do with it:\n\n")
	if compared && *impact != (restoreImpact{}) {
		fmt.Fprint(out, "  --revoke=since  let nothing do more than it may do now: apply what was revoked, deleted or "+
			"narrowed\n                  since to the backup, and what limits have counted (the usual choice)\n")
	} else if compared {
		fmt.Fprint(out, "  --revoke=since  the usual choice; there is nothing to revoke\n")
	}
	fmt.Fprint(out, "  --revoke=all    revoke every token and management key in the backup\n"+
		"  --revoke=none   leave them as they are in the backup\n\n")
	return nil, errors.New("choose what happens to tokens revoked since the backup: repeat the command with one of " +
		"the options above")
}

// compareWithCurrent prints what the backup would make valid again, and returns the rows that prevent it. It
// returns false if there is no current database that can be read; otherwise the current database stays
// attached to st.
func (r *restoration) compareWithCurrent(
	ctx context.Context, st *store, out io.Writer,
) (plan *narrowing, impact *restoreImpact, ok bool) {
	if _, err := os.Stat(r.cfg.databaseFile); err != nil {
		fmt.Fprint(out, "There is no current database, so it is unknown what was revoked since the backup.\n")
		return nil, nil, false
	}
	err := st.attachCurrent(ctx, r.cfg.databaseFile)
	if err == nil {
		plan, impact, err = planNarrowing(ctx, st, r.now.UnixMilli())
	}
	if err != nil {
		fmt.Fprintf(out, "The current database cannot be read (%v), so it is unknown what was revoked since the "+
			"backup.\n", err)
		return nil, nil, false
	}
	if *impact == (restoreImpact{}) {
		fmt.Fprint(out, "Compared with the current database, the backup makes nothing valid or invalid.\n")
		return plan, impact, true
	}
	fmt.Fprint(out, "Compared with the current database, the backup has\n")
	for _, line := range impact.lines() {
		if line.n > 0 {
			fmt.Fprintf(out, "  %s %s\n", countNoun(line.n, line.noun), line.difference)
		}
	}
	return plan, impact, true
}

// planNarrowing compares every row that grants something, after attachCurrent.
func planNarrowing(ctx context.Context, st *store, at int64) (*narrowing, *restoreImpact, error) {
	plan, impact := &narrowing{at: at}, &restoreImpact{}
	tokens, err := st.differingTokens(ctx)
	for i := 0; err == nil && i < len(tokens); i++ {
		err = plan.addToken(impact, &tokens[i])
	}
	if err != nil {
		return nil, nil, err
	}
	keys, err := st.differingManagementKeys(ctx)
	for i := range keys {
		plan.addManagementKey(impact, &keys[i])
	}
	if err != nil {
		return nil, nil, err
	}
	projects, err := st.differingProjects(ctx)
	for i := 0; err == nil && i < len(projects); i++ {
		err = plan.addProject(impact, &projects[i])
	}
	if err != nil {
		return nil, nil, err
	}
	upstreams, err := st.upstreamPairs(ctx)
	for i := 0; err == nil && i < len(upstreams); i++ {
		err = plan.addUpstream(impact, &upstreams[i])
	}
	if err != nil {
		return nil, nil, err
	}
	impact.restoreCount, err = st.countRestored(ctx)
	return plan, impact, err
}

// A restoreLine says how many objects differ in one way.
type restoreLine struct {
	n                int64
	noun, difference string
}

// lines describes the impact, in the order in which it is printed.
func (i *restoreImpact) lines() []restoreLine {
	return []restoreLine{
		{i.revoked, "token", "valid, but revoked now"},
		{i.rotated, "token", "with the value from before a rotation"},
		{i.expiryShortened, "token", "with a later expiry"},
		{i.idleShortened, "token", "with a longer idle expiry"},
		{i.requestsLowered, "token", "with more requests allowed in total"},
		{i.tokenPolicies, "token", "with a policy that allows more"},
		{i.requestCounts, "token", "with fewer counted requests, so that more are left"},
		{i.limitUse, "token", "with less recorded use, so that more is left of limits by the hour or longer"},
		{i.managementKeys, "management key", "with rights that were reduced since"},
		{i.deactivated, "project", "active, but inactive or deleted now"},
		{i.projectPolicies, "project", "with a policy that allows more"},
		{i.upstreamsEnded, "upstream", "active, but inactive or deleted now"},
		{i.upstreamKeys, "upstream", "with the provider key from before a change"},
		{i.upstreamsNarrowed, "upstream", "for more projects, models or calls per minute"},
		{i.createdSince, "valid token", "fewer, because they were created since"},
		{i.widened, "object", "with fewer rights, because it was given more since"},
		{i.prices, "price", "from before a change, which --revoke=since leaves as in the backup: check the prices"},
	}
}

// replaceDatabase moves the current database aside and the copy into its place. A crash in
// between leaves no database, which the next start notices and refuses; it never leaves a
// database without its log or with another one's. It returns the new name of the current
// database, or "" if there was none.
func (r *restoration) replaceDatabase() (aside string, err error) {
	file := r.cfg.databaseFile
	newName := unusedFileName(file + ".before-restore-" + r.now.UTC().Format("20060102T150405Z"))
	if err := os.Rename(file, newName); err == nil {
		aside = newName
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	// SQLite would use a log that stays for the new database. The log moves with its own
	// database, because it may contain data that is not in the file yet.
	if err := os.Rename(file+"-wal", newName+"-wal"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return aside, err
	}
	if err := os.Rename(unwrittenFileName(file), unwrittenFileName(newName)); err != nil &&
		!errors.Is(err, fs.ErrNotExist) {
		return aside, err
	}
	if err := os.Remove(file + "-shm"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return aside, err
	}
	if err := syncDir(filepath.Dir(file)); err != nil {
		return aside, err
	}
	if err := os.Rename(r.copyFile, file); err != nil {
		return aside, err
	}
	return aside, syncDir(filepath.Dir(file))
}

// unusedFileName returns name, with a number added if a file of that name exists.
func unusedFileName(name string) string {
	candidate := name
	for i := 2; ; i++ {
		if _, err := os.Lstat(candidate); errors.Is(err, fs.ErrNotExist) {
			return candidate
		}
		candidate = fmt.Sprintf("%s-%d", name, i)
	}
}

const migrateUsage = "usage: llm-proxy migrate-database --from sqlite:FILE --to postgres://USER@HOST/NAME"

// migrateDatabase copies a SQLite database, whose server is stopped, into an empty PostgreSQL database, and verifies
// the copy. The source does not change. Repeating the command continues a copy that was interrupted.
func (p *program) migrateDatabase(ctx context.Context, args []string) error {
	if len(args) != 4 || args[0] != "--from" || args[2] != "--to" || isPostgresURL(args[1]) || !isPostgresURL(args[3]) {
		return errors.New(migrateUsage)
	}
	configFor := func(url string) (*config, error) {
		cfg, err := loadConfig(func(name string) string {
			switch {
			case name == "DATABASE_URL":
				return url
			case name == "DATABASE_PASSWORD_FILE" && !isPostgresURL(url):
				return ""
			}
			return p.getenv(name)
		})
		if err != nil {
			return nil, fmt.Errorf("the configuration has problems:\n%w", err)
		}
		return cfg, nil
	}
	from, err := configFor(args[1])
	if err != nil {
		return err
	}
	to, err := configFor(args[3])
	if err != nil {
		return err
	}
	dir, err := lockDataDir(from)
	if err != nil {
		return err
	}
	defer dir.close()
	if _, err := os.Stat(from.unwrittenFile()); err == nil {
		return fmt.Errorf("%s has calls that the database does not have; start the server once, which records them, "+
			"then repeat", from.unwrittenFile())
	}
	source, err := openToRead(ctx, from)
	if err != nil {
		return err
	}
	defer source.close()
	if version, supported, err := source.schemaVersion(ctx); err != nil || version != supported {
		return errors.Join(fmt.Errorf("%s has schema %d, and this program supports %d; start this version on it once, "+
			"which migrates it, then repeat", from.databaseName, version, supported), err)
	}
	target, err := openPostgres(ctx, to.postgres, true)
	if err != nil {
		return err
	}
	defer target.close()
	return p.copyDatabase(ctx, to, source, target)
}

// copyDatabase copies source to target, verifies the copy, and makes it one that a server may open.
func (p *program) copyDatabase(ctx context.Context, to *config, source, target *store) error {
	err := copyToPostgres(ctx, source, target, func(table string, rows int64) {
		fmt.Fprintf(p.stdout, "%s: %s\n", table, countNoun(rows, "row"))
	})
	if err != nil {
		return err
	}
	trail, err := verifyAudit(ctx, to, target, nil)
	if err != nil {
		return fmt.Errorf("verifying the copy: %w", err)
	}
	if !trail.intact() {
		return fmt.Errorf("the audit trail of the copy is damaged from event %d on; check the source with "+
			"llm-proxy audit verify", trail.firstProblemSeq)
	}
	foreign, n, err := verifyRows(ctx, to, target)
	if err != nil {
		return fmt.Errorf("verifying the copy: %w", err)
	}
	if err := p.reportRows(foreign, n, to.databaseName); err != nil {
		return err
	}
	if err := endCopy(ctx, target); err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, "The copy is complete and verified: the audit trail is intact, %s.\n"+
		"Start the server with DATABASE_URL=%s, and the same encryption key. The source did not change.\n",
		trail, to.databaseName)
	return nil
}

const rekeyUsage = "usage: llm-proxy rekey [FILE]"

// rekey encrypts everything with the key in FILE, or with a new key that replaces the key
// file.
func (p *program) rekey(ctx context.Context, args []string) error {
	if len(args) > 1 || len(args) == 1 && strings.HasPrefix(args[0], "-") {
		return errors.New(rekeyUsage)
	}
	cfg, err := p.config()
	if err != nil {
		return err
	}
	if len(args) == 0 && cfg.encryptionKey != nil {
		return errors.New("the encryption key is in a setting, which this command cannot change; " +
			"write a new one to a file (openssl rand -hex 32 > FILE) and run: llm-proxy rekey FILE")
	}
	dir, err := lockDataDir(cfg)
	if err != nil {
		return err
	}
	defer dir.close()
	existing, err := openToRead(ctx, cfg)
	if err != nil {
		return err
	}
	if err := existing.close(); err != nil {
		return err
	}
	st, err := openDatabase(ctx, cfg.databaseFile, cfg.postgres)
	if err != nil {
		return err
	}
	keyFile, ownFile := filepath.Join(cfg.dataDir, keyFileName), filepath.Join(cfg.dataDir, newKeyFileName)
	name := ownFile
	if len(args) == 1 {
		name = args[0]
	}
	n, newSealer, err := rekeyDatabase(ctx, cfg, st, name, name == ownFile)
	// close empties the write-ahead log, which has values that were encrypted with the old key.
	if err = errors.Join(err, st.close()); err != nil {
		return err
	}
	if name == ownFile {
		if err := replaceFile(ownFile, keyFile); err != nil {
			return fmt.Errorf("the database has the new key, but the key file could not be replaced: %w; repeat "+
				"the command", err)
		}
	}
	fmt.Fprintf(p.stdout, "All secrets are now encrypted with the key %s: %s, and the keys of the audit trail and "+
		"of stored content.\n",
		newSealer.id(), countNoun(n, "provider key"))
	if name != ownFile {
		fmt.Fprintf(p.stdout, "Start the server with ENCRYPTION_KEY_FILE=%s (or the same in ENCRYPTION_KEY).\n", name)
	}
	if _, err := os.Stat(keyFile); err == nil && name != ownFile {
		fmt.Fprintf(p.stdout, "%s is only needed for older backups.\n", keyFile)
	}
	fmt.Fprintln(p.stdout, "Older backups need the old key. Make a new backup.")
	return nil
}

// rekeyDatabase encrypts the secrets in the database with the key in the file name. If create
// is true, it creates the file if missing. A database that already has that key does not
// change. It returns the number of provider keys.
func rekeyDatabase(
	ctx context.Context, cfg *config, st *store, name string, create bool,
) (n int64, to *sealer, err error) {
	check, err := st.setting(ctx, keyCheckSetting)
	if err != nil {
		return 0, nil, fmt.Errorf("reading the key check: %w", err)
	}
	old, oldErr := encryptionKey(cfg)
	var from *sealer
	if oldErr == nil {
		if from, oldErr = sealerFromKey(old); oldErr == nil {
			oldErr = checkSealer(from, check)
		}
	}
	to, err = sealerFromFile(name)
	if create && err != nil && oldErr == nil { // missing, or incomplete after a crash: nothing is encrypted with it
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, nil, fmt.Errorf("removing the file that an earlier run left: %w", err)
		}
		if err := writeNewFile(name, newEncryptionKey()()+"\n"); err != nil {
			return 0, nil, fmt.Errorf("writing the new key: %w", err)
		}
		to, err = sealerFromFile(name)
	}
	if create && err != nil && oldErr != nil {
		return 0, nil, oldErr
	}
	if err != nil {
		return 0, nil, err
	}
	if oldErr == nil && to.id() == from.id() {
		return 0, nil, fmt.Errorf("the key in %s is already in use", name)
	}
	if checkSealer(to, check) == nil { // an earlier run has done this
		n, err = st.countSealedKeys(ctx)
		return n, to, err
	}
	if oldErr != nil {
		return 0, nil, oldErr
	}
	if err := st.openAudit(ctx, from, systemOrigin(time.Now())); err != nil {
		return 0, nil, err
	}
	n, err = st.reseal(ctx, systemOrigin(time.Now()), from, to, baseURLOrigin)
	return n, to, err
}

// sealerFromFile reads the encryption key in a file.
func sealerFromFile(name string) (*sealer, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("the new key %s cannot be read: %w", name, unwrapPathError(err))
	}
	sl, err := sealerFromKey(newSecret(string(text)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return sl, nil
}

// replaceFile renames a file over another and syncs the directory.
func replaceFile(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

// A restoreImpact counts what a backup would grant again, by the kind of difference.
type restoreImpact struct {
	restoreCount
	revoked, rotated, expiryShortened               int64 // tokens
	idleShortened, requestsLowered, tokenPolicies   int64 // tokens
	managementKeys                                  int64
	deactivated, projectPolicies                    int64 // projects
	upstreamsEnded, upstreamKeys, upstreamsNarrowed int64 // upstreams
	widened                                         int64 // rows that grant more now than they will
}

// addToken narrows a token and counts how.
func (n *narrowing) addToken(impact *restoreImpact, p *restorePair[tokenRow]) error {
	t, c := p.backup, &p.current
	switch {
	case c.revokedAt != nil:
		t.revokedAt = c.revokedAt
		impact.revoked++
	case !bytes.Equal(t.hash, c.hash): // the new value is unknown to the backup; the old one may have leaked
		t.revokedAt = &n.at
		impact.rotated++
	default:
		if !bytes.Equal(t.oldHash, c.oldHash) {
			t.oldHash, t.oldHashUntil = nil, nil
		}
		t.oldHashUntil, _ = lower(t.oldHashUntil, c.oldHashUntil)
		var shorter, sooner, fewer, narrower bool
		t.expiresAt, shorter = lower(t.expiresAt, c.expiresAt)
		t.idleExpiry, sooner = lower(t.idleExpiry, c.idleExpiry)
		t.maxRequests, fewer = lower(t.maxRequests, c.maxRequests)
		policy, widened, err := narrowPolicy(t.policy, c.policy, false)
		if err != nil {
			return fmt.Errorf("the policy of token %s: %w", t.id, err)
		}
		narrower, t.policy = policy != t.policy, policy
		impact.expiryShortened += oneIf(shorter)
		impact.idleShortened += oneIf(sooner)
		impact.requestsLowered += oneIf(fewer)
		impact.tokenPolicies += oneIf(narrower)
		impact.widened += oneIf(widened || isLower(t.expiresAt, c.expiresAt) ||
			isLower(t.idleExpiry, c.idleExpiry) || isLower(t.maxRequests, c.maxRequests))
		if !shorter && !sooner && !fewer && !narrower {
			return nil
		}
	}
	n.tokens = append(n.tokens, t)
	return nil
}

// addManagementKey narrows a management key and counts how.
func (n *narrowing) addManagementKey(impact *restoreImpact, p *restorePair[managementKeyRow]) {
	k, c := p.backup, &p.current
	var shorter bool
	k.expiresAt, shorter = lower(k.expiresAt, c.expiresAt)
	lowered := role(c.role).rank() < role(k.role).rank()
	if lowered {
		k.role = c.role
	}
	k.revokedAt = c.revokedAt
	impact.widened += oneIf(c.revokedAt == nil && (c.role != k.role || isLower(k.expiresAt, c.expiresAt)))
	if shorter || lowered || k.revokedAt != nil {
		impact.managementKeys++
		n.keys = append(n.keys, k)
	}
}

// addProject narrows a project and counts how. One that is deleted now is deleted again: its tokens are revoked
// and its provider keys wiped in the current database, so addToken and addUpstream do the same.
func (n *narrowing) addProject(impact *restoreImpact, p *restorePair[projectRow]) error {
	row, c := p.backup, &p.current
	ended := c.deletedAt != nil || row.active && !c.active
	row.active, row.deletedAt = row.active && c.active && c.deletedAt == nil, c.deletedAt
	if row.deletedAt != nil {
		row.name += " (deleted " + row.id + ")"
	}
	policy, widened, err := narrowPolicy(row.policy, c.policy, true)
	if err != nil {
		return fmt.Errorf("the policy of project %s: %w", row.id, err)
	}
	narrower := policy != row.policy
	row.policy = policy
	impact.deactivated += oneIf(ended)
	impact.projectPolicies += oneIf(narrower && !ended)
	impact.widened += oneIf(widened || c.active && !row.active)
	if ended || narrower {
		n.projects = append(n.projects, row)
	}
	return nil
}

// addUpstream narrows an upstream and counts how.
func (n *narrowing) addUpstream(impact *restoreImpact, p *restorePair[upstreamRow]) error {
	u, c := p.backup, &p.current
	rotated := u.takeNewKey(c)
	ended := c.deletedAt != nil || u.active && !c.active
	u.active, u.deletedAt = u.active && c.active, c.deletedAt
	if u.deletedAt != nil {
		u.active, u.sealedKey, u.keyHint = false, []byte{}, ""
	}
	narrower, err := u.narrowUse(c)
	if err != nil {
		return fmt.Errorf("upstream %s: %w", u.id, err)
	}
	impact.upstreamsEnded += oneIf(ended)
	impact.upstreamKeys += oneIf(rotated && !ended)
	impact.upstreamsNarrowed += oneIf(narrower && !ended)
	if ended || rotated || narrower {
		n.upstreams = append(n.upstreams, u)
	}
	return nil
}

// auditFields are what the audit trail records of a narrowing: how many rows of each kind changed.
func (n *narrowing) auditFields() []auditField {
	all := []auditField{{"tokens", len(n.tokens)}, {"management_keys", len(n.keys)}, {"projects", len(n.projects)},
		{"upstreams", len(n.upstreams)}}
	return slices.DeleteFunc(all, func(f auditField) bool { return f.value == 0 })
}

// oneIf returns 1 or 0.
func oneIf(yes bool) int64 {
	if yes {
		return 1
	}
	return 0
}
