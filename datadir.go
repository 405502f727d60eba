// This file manages the data directory: its permissions, the lock that keeps a second process
// out, the encryption key in it and the key of stored content in its database, and the check that
// its database is the one that was there before. It never overwrites a key or a database.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	lockFileName    = "llm-proxy.lock"
	keyFileName     = "encryption.key"
	replicaFileName = "replica"
)

// checkDirectory returns an error if dir cannot be written to, or created. It leaves
// nothing behind.
func checkDirectory(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if parent := filepath.Dir(dir); parent != dir {
			return checkDirectory(parent)
		}
	}
	if err != nil {
		return fmt.Errorf("%q: %w; %s", dir, unwrapPathError(err), fileRemedy(err))
	}
	if !info.IsDir() {
		return fmt.Errorf("%q is not a directory; name a directory, or remove that file", dir)
	}
	f, err := os.CreateTemp(dir, ".writable-*")
	if err != nil {
		return fmt.Errorf("%q cannot be written to: %w; %s, or choose another directory",
			dir, unwrapPathError(err), fileRemedy(err))
	}
	f.Close()
	return os.Remove(f.Name())
}

// checkDatabaseFile checks a database file outside DATA_DIR. The operator creates its
// directory, not the program.
func checkDatabaseFile(file string, checkDirectory func(string) error) error {
	dir := filepath.Dir(file)
	switch info, err := os.Stat(file); {
	case err == nil && info.IsDir():
		return fmt.Errorf("%q is a directory; name a file in it", file)
	case err == nil && !info.Mode().IsRegular(): // a start would restrict the access to a device such as /dev/null
		return fmt.Errorf("%q is not a regular file; name another file", file)
	}
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("%q: %w; create the directory first", dir, unwrapPathError(err))
	}
	return checkDirectory(dir)
}

// readSecretFile reads a secret from a file. A newline at the end is not part of the secret.
func readSecretFile(name string, field *secret, check func(string) error) error {
	f, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("names a file that cannot be read: %w; %s", unwrapPathError(err), fileRemedy(err))
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4097))
	if err != nil {
		return fmt.Errorf("names a file that cannot be read: %w; %s", unwrapPathError(err), fileRemedy(err))
	}
	if len(b) > 4096 {
		return errors.New("names a file that is larger than 4 KiB; it must contain only the secret")
	}
	v := string(bytes.TrimRight(b, "\r\n"))
	if err := check(v); err != nil {
		return fmt.Errorf("names a file whose content %w", err)
	}
	*field = newSecret(v)
	return nil
}

// unwrapPathError removes the operation and the path from an error, which may be a secret.
func unwrapPathError(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

// A dataDir is a data directory that this process has locked.
type dataDir struct {
	lock          *os.File
	databaseLocks []*os.File
	path          string
	databaseFile  string
	openedInfo    fs.FileInfo
	databaseGone  atomic.Bool // the file at databaseFile is not the opened one any more
}

// openDataDir locks the data directory and creates what is missing. The caller closes it.
func openDataDir(cfg *config) (*dataDir, error) {
	d, err := lockDataDir(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.postgres == nil {
		err = d.ensureDatabaseFile()
	}
	if err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// lockDataDir is openDataDir without a check of the database, which may be missing.
func lockDataDir(cfg *config) (*dataDir, error) {
	if err := os.MkdirAll(cfg.dataDir, 0o700); err != nil {
		return nil, fmt.Errorf("creating the data directory: %w; %s", err, fileRemedy(err))
	}
	lock, err := lockFile(filepath.Join(cfg.dataDir, lockFileName), os.O_CREATE)
	if err != nil {
		return nil, err
	}
	d := &dataDir{lock: lock, path: cfg.dataDir, databaseFile: cfg.databaseFile}
	if cfg.postgres != nil {
		return d, nil
	}
	if filepath.Dir(d.databaseFile) != d.path { // while a restore replaces the file, only its name is locked
		err = d.lockDatabase(d.databaseFile+".lock", os.O_CREATE)
	}
	if err == nil {
		err = d.lockDatabase(d.databaseFile, 0)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.close()
		return nil, err
	}
	return d, nil
}

// lockDatabase locks a file until close. Only a lock on the database file itself keeps out every
// process, whatever its data directory and by whichever name, link or mount it reaches the file.
// SQLite does not notice it: its own locks are of another kind.
func (d *dataDir) lockDatabase(name string, flags int) error {
	f, err := lockFile(name, flags)
	if err == nil {
		d.databaseLocks = append(d.databaseLocks, f)
	}
	return err
}

// lockFile opens a file and locks it for this process until it is closed.
func lockFile(name string, flags int) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking: %w; %s", err, fileRemedy(err))
	}
	for attempts := 10; ; attempts-- {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil || attempts == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond) // a process that is just ending, or its child, releases the lock soon
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("another llm-proxy is using %s (locking %s: %w); stop it, or set another DATA_DIR and "+
			"database for this one", filepath.Dir(name), name, err)
	}
	opened, err := f.Stat()
	if now, statErr := os.Stat(name); err != nil || statErr != nil || !os.SameFile(opened, now) {
		f.Close()
		return nil, fmt.Errorf("%s was replaced at this moment; repeat the command", name)
	}
	return f, nil
}

// fileRemedy says what to do about an error of the file system.
func fileRemedy(err error) string {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("give the user %d, as which this program runs, access to it (chown, chmod)", os.Geteuid())
	case errors.Is(err, syscall.EROFS):
		return "mount it writable, or set DATA_DIR to a directory that is"
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return "free some space"
	}
	return "check that the path is right"
}

// resolveLinks returns path without symbolic links, so that one file has one name. What does not
// exist yet stays as it is.
func resolveLinks(path string) string {
	for range 40 { // links to links; the kernel allows as many
		if resolved, err := filepath.EvalSymlinks(path); err == nil {
			return resolved
		}
		target, err := os.Readlink(path)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
	}
	if parent := filepath.Dir(path); parent != path {
		return filepath.Join(resolveLinks(parent), filepath.Base(path))
	}
	return path
}

// ensureDatabaseFile creates an empty database file if there never was one. The lock file
// records that there was one: a missing database is then an error, because silently starting
// with an empty one would make every token invalid.
func (d *dataDir) ensureDatabaseFile() error {
	recorded, err := d.databaseRecorded()
	if err != nil {
		return err
	}
	info, statErr := os.Stat(d.databaseFile)
	if recorded && (errors.Is(statErr, fs.ErrNotExist) || statErr == nil && info.Size() == 0) {
		return fmt.Errorf("the database %s is missing or empty, but there was one; restore it (llm-proxy restore "+
			"FILE), or remove %s to start with an empty one", d.databaseFile, d.lock.Name())
	}
	f, err := os.OpenFile(d.databaseFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("opening the database file: %w; %s", err, fileRemedy(err))
	}
	defer f.Close()
	if d.openedInfo, err = f.Stat(); err != nil {
		return fmt.Errorf("examining the database file: %w", err)
	}
	if d.openedInfo.Mode().Perm()&0o077 != 0 { // SQLite gives its -wal and -shm files the same mode
		if err := f.Chmod(0o600); err != nil {
			return fmt.Errorf("restricting access to the database: %w", err)
		}
	}
	if errors.Is(statErr, fs.ErrNotExist) { // otherwise it is locked already
		return d.lockDatabase(d.databaseFile, 0)
	}
	return nil
}

// recordDatabase records in the lock file that the database was opened successfully. The file
// has one line for each database.
func (d *dataDir) recordDatabase() error {
	recorded, err := d.databaseRecorded()
	if err != nil || recorded {
		return err
	}
	info, err := d.lock.Stat()
	if err != nil {
		return err
	}
	_, err = d.lock.WriteAt([]byte(d.databaseFile+"\n"), info.Size())
	return err
}

func (d *dataDir) databaseRecorded() (bool, error) {
	text, err := os.ReadFile(d.lock.Name())
	if err != nil {
		return false, fmt.Errorf("reading the lock file: %w", err)
	}
	// Earlier versions recorded the name that was set, which may be a link.
	return slices.ContainsFunc(strings.Split(string(text), "\n"), func(line string) bool {
		return line == d.databaseFile || line != "" && resolveLinks(line) == d.databaseFile
	}), nil
}

// replicaNonce returns the name that the last process with this directory had among the replicas of a PostgreSQL
// database, "" if it is not known. That process has ended, because this one has locked the directory.
func (d *dataDir) replicaNonce() string {
	text, _ := os.ReadFile(filepath.Join(d.path, replicaFileName)) // without it, the replica is found dead later
	return string(text)
}

// recordReplica records what replicaNonce returns to the next process.
func (d *dataDir) recordReplica(nonce string) error {
	return os.WriteFile(filepath.Join(d.path, replicaFileName), []byte(nonce), 0o600)
}

// close releases the locks. The database must be closed: with any file descriptor of it that a
// process closes, the process loses the locks that SQLite has on it.
func (d *dataDir) close() error {
	err := d.lock.Close()
	for _, f := range d.databaseLocks {
		err = errors.Join(err, f.Close())
	}
	return err
}

// watch checks every few seconds whether the database file is still there, until ctx is done:
// SQLite would keep writing to a deleted file.
func (d *dataDir) watch(ctx context.Context, log *slog.Logger) {
	if d.databaseFile == "" {
		return
	}
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		info, err := os.Stat(d.databaseFile)
		gone := err != nil || !os.SameFile(info, d.openedInfo)
		if gone && !d.databaseGone.Swap(true) {
			log.Error("the database file was moved, removed or replaced while in use; calls are refused. Put it "+
				"back, or restart.",
				"file", d.databaseFile)
		} else if !gone && d.databaseGone.Swap(false) {
			log.Info("the database file is back")
		}
	}
}

// databaseProblem describes what is wrong with the database file, or returns "".
func (d *dataDir) databaseProblem() string {
	if d.databaseGone.Load() {
		return "the database file was moved, removed or replaced"
	}
	return ""
}

// unwrittenFileName has rows of calls that a stop could not write to the database, because another process had
// it locked or the disk was full. The next start records and removes them.
func unwrittenFileName(databaseFile string) string { return databaseFile + ".unwritten" }

// unwrittenFile is the unwrittenFileName of the database; with PostgreSQL it is in the data directory.
func (c *config) unwrittenFile() string {
	return unwrittenFileName(cmp.Or(c.databaseFile, filepath.Join(c.dataDir, "postgres")))
}

// openSealer reads the encryption key from the settings or the key file and checks it against
// the database. It creates a new key only for a database that has none; createdFile is then
// the key file.
func openSealer(ctx context.Context, cfg *config, st *store) (sl *sealer, createdFile string, err error) {
	if _, err = st.setting(ctx, keyCheckSetting); err == nil {
		sl, err = openExistingSealer(ctx, cfg, st)
		return sl, "", err
	}
	if !errors.Is(err, errNotFound) {
		return nil, "", fmt.Errorf("reading the key check: %w", err)
	}
	used, hasCredentials, err := st.usedBefore(ctx)
	if err == nil && hasCredentials {
		err = errors.New("the record of the encryption key was removed from the database; restore a backup with " +
			"llm-proxy restore FILE")
	}
	if err != nil {
		return nil, "", err
	}
	key, err := encryptionKey(cfg)
	if errors.Is(err, fs.ErrNotExist) {
		key, createdFile = newEncryptionKey(), filepath.Join(cfg.dataDir, keyFileName)
		if err := writeNewFile(createdFile, key()+"\n"); err != nil {
			return nil, "", fmt.Errorf("writing the key file: %w; %s", err, fileRemedy(err))
		}
	} else if err != nil {
		return nil, "", err
	}
	if sl, err = sealerFromKey(key); err != nil {
		return nil, "", err
	}
	return sl, createdFile, st.setSetting(ctx, keyCheckSetting, sealKeyCheck(sl, !used))
}

// openExistingSealer is openSealer for a database that has a key. It creates nothing.
func openExistingSealer(ctx context.Context, cfg *config, st *store) (*sealer, error) {
	check, err := st.setting(ctx, keyCheckSetting)
	if err != nil {
		return nil, fmt.Errorf("reading the key check: %w", err)
	}
	key, err := encryptionKey(cfg)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the encryption key is missing: this database contains encrypted keys; "+
			"set ENCRYPTION_KEY or ENCRYPTION_KEY_FILE, or restore %s", filepath.Join(cfg.dataDir, keyFileName))
	}
	if err != nil {
		return nil, err
	}
	sl, err := sealerFromKey(key)
	if err != nil {
		return nil, err
	}
	err = checkSealer(sl, check)
	_, statErr := os.Stat(filepath.Join(cfg.dataDir, newKeyFileName))
	if err != nil && statErr == nil && cfg.encryptionKey == nil {
		return nil, errors.New("a change of the encryption key was interrupted; finish it with: llm-proxy rekey")
	}
	return sl, err
}

// encryptionKey returns the key from the settings or from the key file. If neither has one,
// the error is fs.ErrNotExist.
func encryptionKey(cfg *config) (secret, error) {
	if cfg.encryptionKey != nil {
		return cfg.encryptionKey, nil
	}
	text, err := os.ReadFile(filepath.Join(cfg.dataDir, keyFileName))
	if err != nil {
		return nil, fmt.Errorf("reading the key file: %w; %s", err, fileRemedy(err))
	}
	return newSecret(string(text)), nil
}

func sealerFromKey(key secret) (*sealer, error) {
	raw, err := parseEncryptionKey(key())
	if err != nil {
		return nil, fmt.Errorf("the encryption key %w", err)
	}
	return newSealer(raw)
}

func checkSealer(sl *sealer, check string) error {
	if _, err := openKeyCheck(sl, check); err != nil {
		return errors.New("the encryption key is not the one that this database's keys are encrypted with; " +
			"set the right ENCRYPTION_KEY or ENCRYPTION_KEY_FILE")
	}
	return nil
}

// writeNewFile writes a file that must not exist yet, readable by its owner only, and syncs
// it to disk.
func writeNewFile(name, text string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close(), syncDir(filepath.Dir(name)))
}

// syncFile syncs the content of a file to disk.
func syncFile(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// syncDir syncs the names in a directory to disk.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// diskUsage returns the space that the database takes on disk, and the free space.
func (d *dataDir) diskUsage(ctx context.Context, st *store) (u diskUsage, err error) {
	if u.databaseSize, u.reusable, err = st.size(ctx); err != nil {
		return u, err
	}
	dir := d.path
	if d.databaseFile != "" {
		dir, u.databaseSize = filepath.Dir(d.databaseFile), fileSize(d.databaseFile)
		u.walSize = fileSize(d.databaseFile + "-wal")
	}
	free, err := freeSpace(dir)
	u.available = int64(min(free, math.MaxInt64))
	return u, err
}

// newKeyFileName has the new key during a rekey, until the database is encrypted with it, if
// the key is in the data directory.
const newKeyFileName = keyFileName + ".new"

// openContentKey returns the database's content key, and makes one the first time.
func openContentKey(ctx context.Context, st *store, sl *sealer) (*contentKey, error) {
	text, err := st.setting(ctx, contentKeySetting)
	if errors.Is(err, errNotFound) {
		root := newEncryptionKey()
		sealed := base64.StdEncoding.EncodeToString(sl.seal(root, contentKeyContext))
		return &contentKey{root}, st.setSetting(ctx, contentKeySetting, sealed)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the content key: %w", err)
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("opening the content key: %w", errUnseal)
	}
	root, err := sl.open(sealed, contentKeyContext)
	if err != nil {
		return nil, fmt.Errorf("opening the content key: %w", err)
	}
	return &contentKey{root}, nil
}
