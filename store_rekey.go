// SQL for a change of the encryption key: everything that is sealed, once, with
// the server stopped.
package main

import (
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
)

const actionRekey = "database.rekey"

// sealedSettings are the settings that hold something sealed, with what each is
// bound to.
func sealedSettings() map[string]string {
	return map[string]string{"key_check": keyCheckContext, "audit_key": auditKeyContext, contentKeySetting: contentKeyContext}
}

// countSealed counts the provider keys.
func (s *store) countSealed(ctx context.Context) (n int64, err error) {
	if err = s.read.QueryRowContext(ctx, `SELECT count(*) FROM upstreams WHERE length(sealed_key) > 0`).Scan(&n); err != nil {
		return 0, fmt.Errorf("counting provider keys: %w", err)
	}
	return n, nil
}

// reseal seals with to what from has sealed: all of it, or nothing. It returns
// the number of provider keys. What the old key sealed is overwritten in the
// file, for who gets hold of that key later.
func (s *store) reseal(ctx context.Context, by origin, from, to *sealer) (n int64, err error) {
	if _, err := s.write.ExecContext(ctx, `PRAGMA secure_delete = 1`); err != nil {
		return 0, fmt.Errorf("asking for deleted data to be overwritten: %w", err)
	}
	err = s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		for name, bound := range sealedSettings() {
			if err := resealSetting(ctx, tx, name, bound, from, to); err != nil {
				return act{}, fmt.Errorf("the setting %s: %w", name, err)
			}
		}
		if n, err = resealUpstreams(ctx, tx, from, to); err != nil {
			return act{}, err
		}
		return act{actionRekey, "", []fact{{"key", [2]string{from.id(), to.id()}}, {"upstreams", n}}}, nil
	})
	return n, err
}

func resealSetting(ctx context.Context, tx *sql.Tx, name, bound string, from, to *sealer) error {
	var text string
	err := tx.QueryRowContext(ctx, `SELECT value FROM settings WHERE name = ?`, name).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil // not made yet
	}
	if err != nil {
		return err
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return errUnseal
	}
	plain, err := from.open(sealed, bound)
	if err != nil {
		return err
	}
	return putSetting(ctx, tx, name, base64.StdEncoding.EncodeToString(to.seal(plain, bound)))
}

func resealUpstreams(ctx context.Context, tx *sql.Tx, from, to *sealer) (int64, error) {
	rows, err := tx.QueryContext(ctx, `
		SELECT `+upstreamColumns+` FROM upstreams u JOIN projects p ON p.seq = u.project WHERE length(u.sealed_key) > 0 ORDER BY u.seq`)
	if err != nil {
		return 0, fmt.Errorf("reading provider keys: %w", err)
	}
	defer rows.Close()
	var all []upstreamRow
	for rows.Next() {
		var u upstreamRow
		if err := u.scan(rows); err != nil {
			return 0, fmt.Errorf("reading provider keys: %w", err)
		}
		all = append(all, u)
	}
	if err := rows.Err(); err != nil {
		return 0, fmt.Errorf("reading provider keys: %w", err)
	}
	for i := range all {
		u := &all[i]
		base, err := parseBaseURL(u.baseURL, true) // where it may be sent is not the question here
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: base URL %w", u.id, u.projectID, err)
		}
		bound := sealContext(u.id, u.projectID, base.Scheme+"://"+base.Host)
		plain, err := from.open(u.sealedKey, bound)
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: %w; nothing was changed. Give it its provider key anew, or delete it, then repeat", u.id, u.projectID, err)
		}
		if _, err := tx.ExecContext(ctx, `UPDATE upstreams SET sealed_key = ? WHERE seq = ?`, to.seal(plain, bound), u.seq); err != nil {
			return 0, fmt.Errorf("writing upstream %s: %w", u.id, err)
		}
	}
	return int64(len(all)), nil
}
