// This file changes the encryption key, with the server stopped. It decrypts everything with
// the old key and encrypts it with the new one, in one transaction. After a crash the database
// has one key or the other, and repeating the command finishes the change.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

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
	if info, err := os.Stat(cfg.databaseFile); err != nil || info.Size() == 0 {
		return fmt.Errorf("there is no database at %s", cfg.databaseFile)
	}
	st, err := openStore(ctx, cfg.databaseFile)
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
	check, err := st.setting(ctx, "key_check")
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
