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
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	lockName = "llm-proxy.lock"
	keyName  = "encryption.key"
)

// A dataDir is a data directory that this process has to itself.
type dataDir struct {
	lock *os.File
	path string
	file string // the database
	info fs.FileInfo
	lost atomic.Bool // the database file is no longer the one that was opened
}

// openDataDir makes what is missing and takes the lock. The caller closes it.
func openDataDir(cfg *config) (*dataDir, error) {
	if err := os.MkdirAll(cfg.dataDir, 0o700); err != nil {
		return nil, fmt.Errorf("making the data directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(cfg.dataDir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock file: %w", err)
	}
	d := &dataDir{lock: lock, path: cfg.dataDir, file: cfg.databaseFile}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("another llm-proxy is using %s; stop it, or give this one a DATA_DIR of its own", cfg.dataDir)
	}
	if err := d.claimDatabase(); err != nil {
		lock.Close()
		return nil, err
	}
	return d, nil
}

// claimDatabase makes an empty database file if there never was one. The lock
// file remembers that there was: a missing database is then an error, for to
// begin anew silently would make every token unknown.
func (d *dataDir) claimDatabase() error {
	known, err := os.ReadFile(d.lock.Name())
	if err != nil {
		return fmt.Errorf("reading the lock file: %w", err)
	}
	had := strings.Contains(string(known), d.file+"\n")
	info, err := os.Stat(d.file)
	if had && (errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0) {
		return fmt.Errorf("the database %s is missing or empty, but there was one; bring it back (llm-proxy restore FILE), or to begin anew remove %s", d.file, d.lock.Name())
	}
	f, err := os.OpenFile(d.file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("opening the database file: %w", err)
	}
	defer f.Close()
	if d.info, err = f.Stat(); err != nil {
		return fmt.Errorf("looking at the database file: %w", err)
	}
	if d.info.Mode().Perm()&0o077 != 0 { // SQLite gives its -wal and -shm files the same mode
		if err := f.Chmod(0o600); err != nil {
			return fmt.Errorf("keeping others from reading the database: %w", err)
		}
	}
	return nil
}

// remember notes that the database was opened with success.
func (d *dataDir) remember() error {
	_, err := d.lock.WriteAt([]byte(d.file+"\n"), 0)
	return err
}

func (d *dataDir) close() error { return d.lock.Close() } // which gives up the lock

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
		info, err := os.Stat(d.file)
		lost := err != nil || !os.SameFile(info, d.info)
		if lost && !d.lost.Swap(true) {
			log.Error("the database file was moved, removed or replaced while in use; calls are refused. Put it back, or restart.", "file", d.file)
		} else if !lost && d.lost.Swap(false) {
			log.Info("the database file is back")
		}
	}
}

func (d *dataDir) gone() string {
	if d.lost.Load() {
		return "the database file was moved, removed or replaced"
	}
	return ""
}

// openSealer finds the encryption key, in the settings or in the key file, and
// proves it right against the database. Only a database without any key gets a
// new one. made says that a key file was made.
func openSealer(ctx context.Context, cfg *config, st *store) (sl *sealer, made string, err error) {
	check, err := st.setting(ctx, "key_check")
	if err != nil && !errors.Is(err, errNotFound) {
		return nil, "", fmt.Errorf("reading the key check: %w", err)
	}
	fresh := err != nil
	key := cfg.encryptionKey
	if key == nil {
		name := filepath.Join(cfg.dataDir, keyName)
		text, err := os.ReadFile(name)
		switch {
		case err == nil:
			key = newSecret(string(text))
		case !errors.Is(err, fs.ErrNotExist):
			return nil, "", fmt.Errorf("reading the key file: %w", err)
		case !fresh:
			return nil, "", fmt.Errorf("the encryption key is missing: this database holds sealed keys; set ENCRYPTION_KEY or ENCRYPTION_KEY_FILE, or bring back %s", name)
		default:
			key = newEncryptionKey()
			if err := writeNewFile(name, key()+"\n"); err != nil {
				return nil, "", fmt.Errorf("writing the key file: %w", err)
			}
			made = name
		}
	}
	raw, err := parseEncryptionKey(key())
	if err != nil {
		return nil, "", fmt.Errorf("the encryption key %w", err)
	}
	if sl, err = newSealer(raw); err != nil {
		return nil, "", err
	}
	if fresh {
		sealed := base64.StdEncoding.EncodeToString(sl.seal(newSecret("llm-proxy"), keyCheckContext))
		return sl, made, st.setSetting(ctx, "key_check", sealed)
	}
	return sl, "", checkSealer(sl, check)
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
	return errors.Join(err, f.Sync(), f.Close())
}

// freeSpace returns the bytes that this user can still write below path.
func freeSpace(path string) (uint64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, err
	}
	return uint64(st.Bavail) * uint64(st.Bsize), nil
}
