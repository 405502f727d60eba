// This room keeps the data directory: who may read it, that one process has it,
// the encryption key in it, and that the database in it is the one that was
// there before. It never overwrites a key or a database.
package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
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
	lockFileName = "llm-proxy.lock"
	keyFileName  = "encryption.key"
)

// A dataDir is a data directory that this process has to itself.
type dataDir struct {
	lock         *os.File
	databaseLock *os.File // of a database elsewhere; nil if it is in path
	path         string
	databaseFile string // the database
	openedInfo   fs.FileInfo
	databaseGone atomic.Bool // the database file is no longer the one that was opened
}

// openDataDir makes what is missing and takes the lock. The caller closes it.
func openDataDir(cfg *config) (*dataDir, error) {
	d, err := lockDataDir(cfg)
	if err != nil {
		return nil, err
	}
	if err := d.ensureDatabaseFile(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// lockDataDir is openDataDir without a look at the database.
func lockDataDir(cfg *config) (*dataDir, error) {
	if err := os.MkdirAll(cfg.dataDir, 0o700); err != nil {
		return nil, fmt.Errorf("making the data directory: %w", err)
	}
	lock, err := lockFile(filepath.Join(cfg.dataDir, lockFileName))
	if err != nil {
		return nil, err
	}
	d := &dataDir{lock: lock, path: cfg.dataDir, databaseFile: cfg.databaseFile}
	if filepath.Dir(d.databaseFile) != d.path { // two directories may name one database
		if d.databaseLock, err = lockFile(d.databaseFile + ".lock"); err != nil {
			d.close()
			return nil, err
		}
	}
	return d, nil
}

// lockFile opens name and locks it for this process, which closing it ends.
func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock file: %w", err)
	}
	for tries := 10; ; tries-- {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil || tries == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond) // one that is just ending, or a process that it was starting, lets go soon
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("another llm-proxy is using %s; stop it, or give this one a DATA_DIR and a database of its own", filepath.Dir(name))
	}
	return f, nil
}

// ensureDatabaseFile makes an empty database file if there never was one. The lock
// file remembers that there was: a missing database is then an error, for to
// begin anew silently would make every token unknown.
func (d *dataDir) ensureDatabaseFile() error {
	had, err := d.databaseRecorded()
	if err != nil {
		return err
	}
	info, err := os.Stat(d.databaseFile)
	if had && (errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0) {
		return fmt.Errorf("the database %s is missing or empty, but there was one; bring it back (llm-proxy restore FILE), or to begin anew remove %s", d.databaseFile, d.lock.Name())
	}
	f, err := os.OpenFile(d.databaseFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("opening the database file: %w", err)
	}
	defer f.Close()
	if d.openedInfo, err = f.Stat(); err != nil {
		return fmt.Errorf("looking at the database file: %w", err)
	}
	if d.openedInfo.Mode().Perm()&0o077 != 0 { // SQLite gives its -wal and -shm files the same mode
		if err := f.Chmod(0o600); err != nil {
			return fmt.Errorf("keeping others from reading the database: %w", err)
		}
	}
	return nil
}

// recordDatabase notes that the database was opened with success. The lock file has
// one line for each database that ever was.
func (d *dataDir) recordDatabase() error {
	had, err := d.databaseRecorded()
	if err != nil || had {
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
	known, err := os.ReadFile(d.lock.Name())
	if err != nil {
		return false, fmt.Errorf("reading the lock file: %w", err)
	}
	return slices.Contains(strings.Split(string(known), "\n"), d.databaseFile), nil
}

// close gives up the locks.
func (d *dataDir) close() error {
	err := d.lock.Close()
	if d.databaseLock != nil {
		err = errors.Join(err, d.databaseLock.Close())
	}
	return err
}

// watch looks every few seconds whether the database file is still there, until
// ctx is over: SQLite would go on writing to a file that has no name any more.
func (d *dataDir) watch(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		info, err := os.Stat(d.databaseFile)
		lost := err != nil || !os.SameFile(info, d.openedInfo)
		if lost && !d.databaseGone.Swap(true) {
			log.Error("the database file was moved, removed or replaced while in use; calls are refused. Put it back, or restart.", "file", d.databaseFile)
		} else if !lost && d.databaseGone.Swap(false) {
			log.Info("the database file is back")
		}
	}
}

func (d *dataDir) databaseProblem() string {
	if d.databaseGone.Load() {
		return "the database file was moved, removed or replaced"
	}
	return ""
}

// openSealer finds the encryption key, in the settings or in the key file, and
// proves it right against the database. Only a database without any key gets a
// new one. made says that a key file was made.
func openSealer(ctx context.Context, cfg *config, st *store) (sl *sealer, made string, err error) {
	if _, err = st.setting(ctx, "key_check"); err == nil {
		sl, err = openExistingSealer(ctx, cfg, st)
		return sl, "", err
	}
	if !errors.Is(err, errNotFound) {
		return nil, "", fmt.Errorf("reading the key check: %w", err)
	}
	key, err := encryptionKey(cfg)
	if errors.Is(err, fs.ErrNotExist) {
		key, made = newEncryptionKey(), filepath.Join(cfg.dataDir, keyFileName)
		if err := writeNewFile(made, key()+"\n"); err != nil {
			return nil, "", fmt.Errorf("writing the key file: %w", err)
		}
	} else if err != nil {
		return nil, "", err
	}
	if sl, err = sealerFromKey(key); err != nil {
		return nil, "", err
	}
	sealed := base64.StdEncoding.EncodeToString(sl.seal(newSecret("llm-proxy"), keyCheckContext))
	return sl, made, st.setSetting(ctx, "key_check", sealed)
}

// openExistingSealer is openSealer for a database that has its key: it makes nothing.
func openExistingSealer(ctx context.Context, cfg *config, st *store) (*sealer, error) {
	check, err := st.setting(ctx, "key_check")
	if err != nil {
		return nil, fmt.Errorf("reading the key check: %w", err)
	}
	key, err := encryptionKey(cfg)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the encryption key is missing: this database holds sealed keys; set ENCRYPTION_KEY or ENCRYPTION_KEY_FILE, or bring back %s", filepath.Join(cfg.dataDir, keyFileName))
	}
	if err != nil {
		return nil, err
	}
	sl, err := sealerFromKey(key)
	if err != nil {
		return nil, err
	}
	err = checkSealer(sl, check)
	if _, e := os.Stat(filepath.Join(cfg.dataDir, newKeyFileName)); err != nil && e == nil && cfg.encryptionKey == nil {
		return nil, errors.New("a change of the encryption key was interrupted; finish it with: llm-proxy rekey")
	}
	return sl, err
}

// encryptionKey returns the key from the settings, or from the key file. Where
// there is neither, the error is fs.ErrNotExist.
func encryptionKey(cfg *config) (secret, error) {
	if cfg.encryptionKey != nil {
		return cfg.encryptionKey, nil
	}
	text, err := os.ReadFile(filepath.Join(cfg.dataDir, keyFileName))
	if err != nil {
		return nil, fmt.Errorf("reading the key file: %w", err)
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
	sealed, err := base64.StdEncoding.DecodeString(check)
	if err == nil {
		_, err = sl.open(sealed, keyCheckContext)
	}
	if err != nil {
		return errors.New("the encryption key is not the one that this database's keys are sealed with; set the right ENCRYPTION_KEY or ENCRYPTION_KEY_FILE")
	}
	return nil
}

// writeNewFile writes a file that must not exist, for its owner only, and makes
// sure that it is on disk.
func writeNewFile(name, text string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close(), syncDir(filepath.Dir(name)))
}

// syncFile makes sure that what was written to a file is on disk.
func syncFile(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// syncDir makes sure that the names in a directory are on disk.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// diskUsage says how much the database takes on disk, and how much is left.
func (d *dataDir) diskUsage(ctx context.Context, st *store) (u diskUsage, err error) {
	if _, u.reusable, err = st.size(ctx); err != nil {
		return u, err
	}
	for _, part := range []struct {
		to   *int64
		name string
	}{{&u.databaseSize, d.databaseFile}, {&u.walSize, d.databaseFile + "-wal"}} {
		if info, err := os.Stat(part.name); err == nil {
			*part.to = info.Size()
		}
	}
	left, err := freeSpace(filepath.Dir(d.databaseFile))
	u.available = int64(min(left, math.MaxInt64))
	return u, err
}

// cpuTime returns the processor time of this process in microseconds, and false
// if it cannot be known.
func cpuTime() (us int64, ok bool) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, false
	}
	return int64(u.Utime.Sec+u.Stime.Sec)*1_000_000 + int64(u.Utime.Usec+u.Stime.Usec), true
}

// freeSpace returns the bytes that this user can still write below path.
func freeSpace(path string) (uint64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, err
	}
	return uint64(st.Bavail) * uint64(st.Bsize), nil
}

// newKeyFileName is where a new key waits until the database has been sealed with
// it, if the key lives in the data directory.
const newKeyFileName = keyFileName + ".new"
