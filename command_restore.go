// This room puts a backup in the database's place, with the server stopped.
// Everything is done and proved on a copy first; then files are only renamed.
// The database that was there is moved aside and never deleted. A backup brings
// back to life what was revoked after it: the operator has to say what becomes
// of that.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const restoreUsage = "usage: llm-proxy restore FILE [--revoke=since|all|none]"

// A restoration is one run of the command.
type restoration struct {
	cfg        *config
	backupFile string // the backup
	copyFile   string // what will take the database's place
	revokeMode string // since, all, none; "" : not said
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
	dir, err := lockDataDir(r.cfg)
	if err != nil {
		return err
	}
	defer dir.close()
	// The lock is ours, so this name is too, and what a crash left under it.
	r.copyFile = r.cfg.databaseFile + ".restoring"
	if err := removeDatabase(r.copyFile); err != nil {
		return fmt.Errorf("clearing what an earlier restore left: %w", err)
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
		return fmt.Errorf("putting the backup in place: %w; this command may be repeated (the database from before is %s)", err, cmp.Or(aside, r.cfg.databaseFile))
	}
	fmt.Fprintf(p.stdout, "The backup is in place: %s.\n", r.cfg.databaseFile)
	if aside != "" {
		fmt.Fprintf(p.stdout, "The database from before is %s; it holds sealed keys, so remove it when it is not needed any more.\n", aside)
	}
	if key != nil {
		fmt.Fprintf(p.stdout, "All management keys are revoked. A new one (role admin), shown only now:\n\n  %s\n", key())
	}
	return nil
}

// prepareCopy makes the copy that will take the database's place: proved whole,
// with a key that opens it, migrated, and with what the operator wants revoked.
// It returns the new management key, if revoking made one needed.
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
	if err = errors.Join(err, st.close()); err != nil { // which empties its -wal
		return nil, err
	}
	if _, err := os.Stat(r.copyFile + "-wal"); !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("the copy could not be finished: its write-ahead log is still there")
	}
	return key, syncFile(r.copyFile)
}

// copyBackup copies the backup beside the database. What it checks shows a
// file that is not the work of llm-proxy backup.
func (r *restoration) copyBackup() error {
	info, err := os.Stat(r.backupFile)
	if err != nil {
		return fmt.Errorf("%s: %w", r.backupFile, unwrapPathError(err))
	}
	if current, err := os.Stat(r.cfg.databaseFile); err == nil && os.SameFile(info, current) {
		return fmt.Errorf("%s is the database itself", r.backupFile)
	}
	if wal, err := os.Stat(r.backupFile + "-wal"); err == nil && wal.Size() > 0 {
		return fmt.Errorf("%s was copied while in use: part of it is in %s-wal; only llm-proxy backup makes whole copies", r.backupFile, r.backupFile)
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

// applyRevokeMode proves the encryption key, compares with the current database, explains,
// and does what the operator chose.
func (r *restoration) applyRevokeMode(ctx context.Context, st *store, out io.Writer) (secret, error) {
	sl, err := openExistingSealer(ctx, r.cfg, st)
	if err != nil {
		return nil, fmt.Errorf("%w (the backup needs the key with the id %s)", err, r.backupInfo.keyID)
	}
	by := systemOrigin(r.now)
	if err := errors.Join(st.openAudit(ctx, sl, by), st.endAllSessions(ctx)); err != nil {
		return nil, err
	}
	fmt.Fprintf(out, "The backup is whole: %s.\n", r.backupInfo)
	since, compared := r.compareWithCurrent(ctx, st, out)
	a := auditEvent{actionRestore, "", []auditField{{"revoke", r.revokeMode}, {"audit_head_before", st.attachedAuditHead(ctx)}}}
	switch r.revokeMode {
	case "none":
		return nil, st.recordAuditEvent(ctx, by, a)
	case "since":
		if !compared {
			return nil, errors.New("--revoke=since needs a current database to compare with; use --revoke=all or --revoke=none")
		}
		return nil, st.reapplyRevocations(ctx, by, a)
	case "all":
		if err := st.revokeAll(ctx, by, a); err != nil || r.cfg.managementToken != nil {
			return nil, err
		}
		return (&operations{store: st}).createFirstKey(ctx)
	}
	fmt.Fprint(out, "\nTokens and keys that were revoked, rotated or cut short after the backup was made become valid again.\nSay what to do about that:\n\n")
	if compared && since != (restoreImpact{}) {
		fmt.Fprint(out, "  --revoke=since  keep those revoked or cut short that are so now (the usual choice)\n")
	} else if compared {
		fmt.Fprint(out, "  --revoke=since  the usual choice; there is nothing to revoke now\n")
	}
	fmt.Fprint(out, "  --revoke=all    revoke every token and management key in the backup\n  --revoke=none   leave them as they are in the backup\n\n")
	return nil, errors.New("nothing said about what was revoked since the backup; repeat with one of the choices above")
}

// compareWithCurrent says what the backup would bring back to life, as far as the current
// database is there and can be read. It leaves it attached to st.
func (r *restoration) compareWithCurrent(ctx context.Context, st *store, out io.Writer) (since restoreImpact, ok bool) {
	if _, err := os.Stat(r.cfg.databaseFile); err != nil {
		fmt.Fprint(out, "There is no current database, so what was revoked since the backup is not known.\n")
		return since, false
	}
	err := st.attachCurrent(ctx, r.cfg.databaseFile)
	if err == nil {
		since, err = st.restoreImpact(ctx)
	}
	if err != nil {
		fmt.Fprintf(out, "The current database cannot be read (%v), so what was revoked since the backup is not known.\n", err)
		return since, false
	}
	fmt.Fprint(out, "Beside the current database, the backup\n")
	for _, line := range []struct {
		n    int64
		text string
	}{
		{since.revoked, "tokens valid again that are revoked now"},
		{since.rotated, "tokens valid again with the value they had before a rotation"},
		{since.expiryShortened, "tokens valid for longer than now"},
		{since.requestCountLowered, "tokens whose count of requests goes back, so that more are left"},
		{since.managementKeys, "management keys with rights that they do not have now"},
		{since.deactivated, "projects active again that are inactive or deleted now"},
		{since.createdSince, "valid tokens unknown: they were made since"},
	} {
		fmt.Fprintf(out, "  makes %d %s\n", line.n, line.text)
	}
	return since, true
}

// replaceDatabase moves the current database aside and the copy into its place. A crash in
// between leaves no database at all, which the next start notices and refuses,
// never one without its log or with another's. It returns where the database
// went, "" if there was none.
func (r *restoration) replaceDatabase() (aside string, err error) {
	file := r.cfg.databaseFile
	to := unusedFileName(file + ".before-restore-" + r.now.UTC().Format("20060102T150405Z"))
	if err := os.Rename(file, to); err == nil {
		aside = to
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	// A log that stays would be taken for the new database's. It goes with its
	// own, for it may hold what that does not yet.
	if err := os.Rename(file+"-wal", to+"-wal"); err != nil && !errors.Is(err, fs.ErrNotExist) {
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

// unusedFileName returns name, with a number if there is such a file.
func unusedFileName(name string) string {
	try := name
	for i := 2; ; i++ {
		if _, err := os.Lstat(try); errors.Is(err, fs.ErrNotExist) {
			return try
		}
		try = fmt.Sprintf("%s-%d", name, i)
	}
}
