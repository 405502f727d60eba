// This room changes the encryption key, with the server stopped: all that is
// sealed with the old one is sealed with a new one, in one transaction. A crash
// leaves the database with one key or the other, and the command, given again,
// finishes what it began.
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

// rekey seals everything with the key in FILE, or with one that is made now and
// takes the place of the key file.
func (p *program) rekey(ctx context.Context, args []string) error {
	if len(args) > 1 || len(args) == 1 && strings.HasPrefix(args[0], "-") {
		return errors.New(rekeyUsage)
	}
	cfg, err := p.config()
	if err != nil {
		return err
	}
	if len(args) == 0 && cfg.encryptionKey != nil {
		return errors.New("the encryption key stands in a setting, which this command cannot change; write a new one into a file (openssl rand -hex 32 > FILE) and name it: llm-proxy rekey FILE")
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
	own := filepath.Join(cfg.dataDir, newKeyFileName)
	name := own
	if len(args) == 1 {
		name = args[0]
	}
	n, to, err := rekeyDatabase(ctx, cfg, st, name, name == own)
	if err = errors.Join(err, st.close()); err != nil { // which empties the write-ahead log of what the old key sealed
		return err
	}
	if name == own {
		if err := replaceFile(own, filepath.Join(cfg.dataDir, keyFileName)); err != nil {
			return fmt.Errorf("the database has the new key, but the key file could not be replaced: %w; give the command again", err)
		}
	}
	fmt.Fprintf(p.stdout, "Everything is sealed with the key %s now: %d provider keys, and the keys of the audit trail and of kept content.\n", to.id(), n)
	if name != own {
		fmt.Fprintf(p.stdout, "Start the server with ENCRYPTION_KEY_FILE=%s (or the same in ENCRYPTION_KEY).\n", name)
	}
	if _, err := os.Stat(filepath.Join(cfg.dataDir, keyFileName)); err == nil && name != own {
		fmt.Fprintf(p.stdout, "%s is of no use any more, but for the backups from before.\n", filepath.Join(cfg.dataDir, keyFileName))
	}
	fmt.Fprintln(p.stdout, "Backups from before need the key from before. Make a new one.")
	return nil
}

// rekeyDatabase seals the database anew with the key in the file name, which is
// made if made is true and it is not there. A database that has that key already
// is left as it is.
func rekeyDatabase(ctx context.Context, cfg *config, st *store, name string, made bool) (n int64, to *sealer, err error) {
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
	if made && err != nil && oldErr == nil { // not there, or cut short by a crash; nothing can be sealed with it
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, nil, fmt.Errorf("clearing what an earlier run left: %w", err)
		}
		if err := writeNewFile(name, newEncryptionKey()()+"\n"); err != nil {
			return 0, nil, fmt.Errorf("writing the new key: %w", err)
		}
		to, err = sealerFromFile(name)
	}
	if made && err != nil && oldErr != nil {
		return 0, nil, oldErr
	}
	if err != nil {
		return 0, nil, err
	}
	if oldErr == nil && to.id() == from.id() {
		return 0, nil, fmt.Errorf("the key in %s is the one that is in use", name)
	}
	if checkSealer(to, check) == nil { // an earlier run came so far
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

// replaceFile puts a file in another's place, on disk.
func replaceFile(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}
