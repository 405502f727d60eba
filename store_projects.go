// SQL for projects and their upstreams. Contracts: a missing row is
// errNotFound, a stale version errStale, a name in use errTaken.
package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
)

// A projectRow is a project as stored.
type projectRow struct {
	seq                  int64
	id, name             string
	active               bool
	policy, routing      string // JSON
	version              int64
	createdAt, updatedAt int64
}

const projectColumns = `seq, id, name, is_active, policy, routing, version, created_at, updated_at`

func (p *projectRow) scan(row interface{ Scan(...any) error }) error {
	return mapNoRows(row.Scan(&p.seq, &p.id, &p.name, &p.active, &p.policy, &p.routing, &p.version, &p.createdAt, &p.updatedAt))
}

// An upstreamRow is an upstream as stored; its key stays sealed.
type upstreamRow struct {
	seq                         int64
	id                          string
	project                     int64
	projectID                   string
	name, provider, baseURL     string
	sealedKey                   []byte
	keyHint                     string
	organization, openaiProject string
	weight, priority            int64
	models, rewrite, settings   string // JSON
	sharedWith                  string // JSON list of projects beside its own
	active                      bool
	version                     int64
	createdAt, updatedAt        int64
}

const upstreamColumns = `u.seq, u.id, u.project, p.id, u.name, u.provider, u.base_url, u.sealed_key, u.key_hint,
	u.organization, u.openai_project, u.weight, u.priority, u.models, u.rewrite, u.settings, ` + sharedWithColumn + `, u.is_active, u.version, u.created_at, u.updated_at`

func (u *upstreamRow) scan(row interface{ Scan(...any) error }) error {
	return mapNoRows(row.Scan(&u.seq, &u.id, &u.project, &u.projectID, &u.name, &u.provider, &u.baseURL, &u.sealedKey, &u.keyHint,
		&u.organization, &u.openaiProject, &u.weight, &u.priority, &u.models, &u.rewrite, &u.settings, &u.sharedWith, &u.active, &u.version, &u.createdAt, &u.updatedAt))
}

// addProject stores a new project, and its first upstream unless up is nil. It
// fills in the seqs.
func (s *store) addProject(ctx context.Context, by auditOrigin, p *projectRow, up *upstreamRow) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		err := tx.QueryRowContext(ctx, `
			INSERT INTO projects (id, name, is_active, policy, routing, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?)
			RETURNING seq, version`, p.id, p.name, p.active, p.policy, p.routing, p.createdAt, p.updatedAt).Scan(&p.seq, &p.version)
		a := auditEvent{"project.create", p.id, diffAuditFields(nil, p.auditFields())}
		if err != nil || up == nil {
			return a, mapUniqueViolation(err)
		}
		up.project = p.seq
		a.detail = append(a.detail, auditField{"upstream", up.id})
		for _, f := range diffAuditFields(nil, up.auditFields()) {
			a.detail = append(a.detail, auditField{"upstream." + f.name, f.value})
		}
		return a, insertUpstream(ctx, tx, up)
	})
}

// auditFields are what the audit trail says of a project.
func (p *projectRow) auditFields() []auditField {
	return []auditField{{"name", p.name}, {"is_active", p.active}, {"policy", json.RawMessage(p.policy)}, {"routing", json.RawMessage(p.routing)}}
}

// auditFields are what the audit trail says of an upstream. Of its key that is the
// hint, and a mark by which two keys with the same hint are told apart.
func (u *upstreamRow) auditFields() []auditField {
	var key any
	if len(u.sealedKey) > 0 {
		mark := sha256.Sum256(u.sealedKey)
		key = map[string]string{"hint": u.keyHint, "sealed": hex.EncodeToString(mark[:4])}
	}
	return []auditField{{"name", u.name}, {"provider", u.provider}, {"base_url", u.baseURL}, {"api_key", key},
		{"organization", u.organization}, {"openai_project", u.openaiProject}, {"weight", u.weight}, {"priority", u.priority},
		{"models", json.RawMessage(u.models)}, {"rewrite", json.RawMessage(u.rewrite)}, {"settings", json.RawMessage(u.settings)}, {"shared_with", json.RawMessage(u.sharedWith)}, {"is_active", u.active}}
}

func (s *store) projectByID(ctx context.Context, id string) (p projectRow, err error) {
	err = p.scan(s.readDB.QueryRowContext(ctx, `
		SELECT `+projectColumns+` FROM projects WHERE id = ? AND deleted_at IS NULL`, id))
	return p, err
}

func (s *store) projectBySeq(ctx context.Context, seq int64) (p projectRow, err error) {
	err = p.scan(s.readDB.QueryRowContext(ctx, `SELECT `+projectColumns+` FROM projects WHERE seq = ?`, seq))
	return p, err
}

// countProjects counts deleted ones too: it answers "was this ever used?".
func (s *store) countProjects(ctx context.Context) (n int64, err error) {
	err = s.readDB.QueryRowContext(ctx, `SELECT count(*) FROM projects`).Scan(&n)
	return n, err
}

// listProjects returns up to limit projects with seq > after, in seq order.
// active is nil for all; prefix is of the name, "" for all.
func (s *store) listProjects(ctx context.Context, after int64, limit int, active *bool, prefix string) ([]projectRow, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT `+projectColumns+` FROM projects
		WHERE seq > ?1 AND deleted_at IS NULL AND (?2 IS NULL OR is_active = ?2)
			AND (?3 = '' OR (name >= ?3 AND name < ?4))
		ORDER BY seq LIMIT ?5`, after, active, prefix, prefixEnd(prefix), limit)
	if err != nil {
		return nil, fmt.Errorf("listing projects: %w", err)
	}
	defer rows.Close()
	var out []projectRow
	for rows.Next() {
		var p projectRow
		if err := p.scan(rows); err != nil {
			return nil, fmt.Errorf("listing projects: %w", err)
		}
		out = append(out, p)
	}
	return out, rows.Err()
}

// changeProject reads a project, lets change edit it, and writes it back in one
// transaction. version, unless 0, must be the row's.
func (s *store) changeProject(ctx context.Context, by auditOrigin, id string, version, now int64, change func(*projectRow) error) (p projectRow, err error) {
	err = s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		if err := p.scan(tx.QueryRowContext(ctx, `
			SELECT `+projectColumns+` FROM projects WHERE id = ? AND deleted_at IS NULL`, id)); err != nil {
			return auditEvent{}, err
		}
		if version != 0 && version != p.version {
			return auditEvent{}, errStale
		}
		was := p
		if err := change(&p); err != nil {
			return auditEvent{}, err
		}
		p.version, p.updatedAt = p.version+1, now
		_, err := tx.ExecContext(ctx, `
			UPDATE projects SET name = ?, is_active = ?, policy = ?, routing = ?, version = ?, updated_at = ? WHERE seq = ?`,
			p.name, p.active, p.policy, p.routing, p.version, p.updatedAt, p.seq)
		return auditEvent{"project.change", p.id, diffAuditFields(was.auditFields(), p.auditFields())}, mapUniqueViolation(err)
	})
	return p, err
}

// deleteProject takes a project out of use for good: it becomes inactive, its
// tokens are revoked, its provider keys are wiped, its name is free again. Its
// rows stay, for the ledger names them. Deleting twice is errNotFound.
func (s *store) deleteProject(ctx context.Context, by auditOrigin, id string, version, now int64) (p projectRow, err error) {
	err = s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		err := p.scan(tx.QueryRowContext(ctx, `
			UPDATE projects SET deleted_at = ?1, is_active = 0, version = version + 1, updated_at = ?1,
				name = name || ' (deleted ' || id || ')'
			WHERE id = ?2 AND deleted_at IS NULL AND (?3 = 0 OR version = ?3)
			RETURNING `+projectColumns, now, id, version))
		if err == errNotFound && version != 0 {
			return auditEvent{}, staleOrMissing(ctx, tx, `SELECT 1 FROM projects WHERE id = ? AND deleted_at IS NULL`, id)
		}
		if err != nil {
			return auditEvent{}, err
		}
		tokens, err := tx.ExecContext(ctx, `
			UPDATE tokens SET revoked_at = ?1, version = version + 1, updated_at = ?1
			WHERE project = ?2 AND revoked_at IS NULL`, now, p.seq)
		if err != nil {
			return auditEvent{}, err
		}
		if _, err := tx.ExecContext(ctx, `
			UPDATE projects SET version = version + 1, updated_at = ?
			WHERE deleted_at IS NULL AND seq IN (SELECT s.project FROM upstreams u JOIN upstream_shares s ON s.upstream = u.seq WHERE u.project = ?)`, now, p.seq); err != nil {
			return auditEvent{}, err
		}
		upstreams, err := tx.ExecContext(ctx, `
			UPDATE upstreams SET deleted_at = ?1, sealed_key = x'', is_active = 0, version = version + 1, updated_at = ?1
			WHERE project = ?2 AND deleted_at IS NULL`, now, p.seq)
		if err != nil {
			return auditEvent{}, err
		}
		a := auditEvent{"project.delete", id, []auditField{{"name", strings.TrimSuffix(p.name, " (deleted "+id+")")}}}
		for _, part := range []struct {
			name string
			res  sql.Result
		}{{"tokens", tokens}, {"upstreams", upstreams}} {
			n, err := part.res.RowsAffected()
			if err != nil {
				return auditEvent{}, err
			}
			a.detail = append(a.detail, auditField{part.name, n})
		}
		return a, nil
	})
	return p, err
}

// staleOrMissing tells why a conditional change met no row.
func staleOrMissing(ctx context.Context, tx *sql.Tx, query string, id string) error {
	var one int
	if err := tx.QueryRowContext(ctx, query, id).Scan(&one); err != nil {
		return mapNoRows(err)
	}
	return errStale
}

func insertUpstream(ctx context.Context, tx *sql.Tx, u *upstreamRow) error {
	err := tx.QueryRowContext(ctx, `
		INSERT INTO upstreams (id, project, name, provider, base_url, sealed_key, key_hint, organization, openai_project,
			weight, priority, models, rewrite, settings, is_active, created_at, updated_at)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		RETURNING seq, version`,
		u.id, u.project, u.name, u.provider, u.baseURL, u.sealedKey, u.keyHint, u.organization, u.openaiProject,
		u.weight, u.priority, u.models, u.rewrite, u.settings, u.active, u.createdAt, u.updatedAt).Scan(&u.seq, &u.version)
	if err != nil {
		return err
	}
	return u.saveSharing(ctx, tx, u.createdAt)
}

// addUpstream stores a new upstream of the project with u.project, and bumps
// the project's version: what the project does has changed.
func (s *store) addUpstream(ctx context.Context, by auditOrigin, u *upstreamRow, now int64) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		if err := bumpProjectVersion(ctx, tx, u.project, now); err != nil {
			return auditEvent{}, err
		}
		return u.auditEvent("upstream.create", nil), insertUpstream(ctx, tx, u)
	})
}

// auditEvent is what happened to an upstream that had the facts before, nil if it is
// new.
func (u *upstreamRow) auditEvent(action string, before []auditField) auditEvent {
	return auditEvent{action, u.id, append([]auditField{{"project_id", u.projectID}}, diffAuditFields(before, u.auditFields())...)}
}

// bumpProjectVersion bumps a project's version, or returns errNotFound if it was
// deleted: it must not get a key that nobody wipes any more.
func bumpProjectVersion(ctx context.Context, tx *sql.Tx, project, now int64) error {
	return mapNoRows(tx.QueryRowContext(ctx, `
		UPDATE projects SET version = version + 1, updated_at = ? WHERE seq = ? AND deleted_at IS NULL RETURNING seq`, now, project).Scan(&project))
}

// projectUpstreams returns a project's upstreams in the order in which they are
// preferred: priority, then age.
func (s *store) projectUpstreams(ctx context.Context, project int64) ([]upstreamRow, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT `+upstreamColumns+` FROM upstreams u JOIN projects p ON p.seq = u.project
		WHERE u.project = ? AND u.deleted_at IS NULL ORDER BY u.priority, u.seq LIMIT 1000`, project)
	if err != nil {
		return nil, fmt.Errorf("listing upstreams: %w", err)
	}
	defer rows.Close()
	var out []upstreamRow
	for rows.Next() {
		var u upstreamRow
		if err := u.scan(rows); err != nil {
			return nil, fmt.Errorf("listing upstreams: %w", err)
		}
		out = append(out, u)
	}
	return out, rows.Err()
}

func (s *store) upstreamByID(ctx context.Context, projectID, id string) (u upstreamRow, err error) {
	err = u.scan(s.readDB.QueryRowContext(ctx, `
		SELECT `+upstreamColumns+` FROM upstreams u JOIN projects p ON p.seq = u.project
		WHERE u.id = ? AND p.id = ? AND u.deleted_at IS NULL AND p.deleted_at IS NULL`, id, projectID))
	return u, err
}

// changeUpstream is changeProject for upstreams. change may also mark the row
// as deleted, by returning true.
func (s *store) changeUpstream(ctx context.Context, by auditOrigin, projectID, id string, version, now int64, change func(*upstreamRow) (bool, error)) (u upstreamRow, err error) {
	err = s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		if err := u.scan(tx.QueryRowContext(ctx, `
			SELECT `+upstreamColumns+` FROM upstreams u JOIN projects p ON p.seq = u.project
			WHERE u.id = ? AND p.id = ? AND u.deleted_at IS NULL AND p.deleted_at IS NULL`, id, projectID)); err != nil {
			return auditEvent{}, err
		}
		if version != 0 && version != u.version {
			return auditEvent{}, errStale
		}
		was := u
		deleted, err := change(&u)
		if err != nil {
			return auditEvent{}, err
		}
		var deletedAt *int64
		action := "upstream.change"
		if deleted {
			deletedAt, action = &now, "upstream.delete"
		}
		u.version, u.updatedAt = u.version+1, now
		if _, err := tx.ExecContext(ctx, `
			UPDATE upstreams SET name = ?, base_url = ?, sealed_key = ?, key_hint = ?, organization = ?, openai_project = ?,
				weight = ?, priority = ?, models = ?, rewrite = ?, settings = ?, is_active = ?, version = ?, updated_at = ?, deleted_at = ?
			WHERE seq = ?`,
			u.name, u.baseURL, u.sealedKey, u.keyHint, u.organization, u.openaiProject,
			u.weight, u.priority, u.models, u.rewrite, u.settings, u.active, u.version, u.updatedAt, deletedAt, u.seq); err != nil {
			return auditEvent{}, err
		}
		if err := u.saveSharing(ctx, tx, now); err != nil {
			return auditEvent{}, err
		}
		return u.auditEvent(action, was.auditFields()), bumpProjectVersion(ctx, tx, u.project, now)
	})
	return u, err
}

// sharedWithColumn is the list of projects that an upstream u is shared with, as
// JSON.
const sharedWithColumn = `(SELECT json_group_array(id) FROM (
		SELECT o.id FROM upstream_shares s JOIN projects o ON o.seq = s.project
		WHERE s.upstream = u.seq AND o.deleted_at IS NULL ORDER BY o.id))`

// usableUpstreams returns the upstreams that a project's calls may go to, its
// own and those shared with it, in the order in which they are preferred.
func (s *store) usableUpstreams(ctx context.Context, project int64) ([]upstreamRow, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT `+upstreamColumns+` FROM upstreams u JOIN projects p ON p.seq = u.project
		WHERE u.seq IN (SELECT seq FROM upstreams WHERE project = ?1 UNION SELECT upstream FROM upstream_shares WHERE project = ?1)
			AND u.deleted_at IS NULL
		ORDER BY u.priority, u.seq LIMIT 1000`, project)
	if err != nil {
		return nil, fmt.Errorf("listing a project's upstreams: %w", err)
	}
	defer rows.Close()
	var out []upstreamRow
	for rows.Next() {
		var u upstreamRow
		if err := u.scan(rows); err != nil {
			return nil, fmt.Errorf("listing a project's upstreams: %w", err)
		}
		out = append(out, u)
	}
	return out, rows.Err()
}

// sharedProjects returns the projects that an upstream is shared with.
func (s *store) sharedProjects(ctx context.Context, upstream int64) (seqs []int64, err error) {
	rows, err := s.readDB.QueryContext(ctx, `SELECT project FROM upstream_shares WHERE upstream = ?`, upstream)
	if err != nil {
		return nil, fmt.Errorf("reading whom an upstream is shared with: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var seq int64
		if err := rows.Scan(&seq); err != nil {
			return nil, fmt.Errorf("reading whom an upstream is shared with: %w", err)
		}
		seqs = append(seqs, seq)
	}
	return seqs, rows.Err()
}

// saveSharing writes whom an upstream is shared with, and bumps the versions of all
// projects that this or another change of it concerns.
func (u *upstreamRow) saveSharing(ctx context.Context, tx *sql.Tx, now int64) error {
	if err := bumpSharedVersions(ctx, tx, u.seq, now); err != nil {
		return err
	}
	var ids []string
	if err := json.Unmarshal([]byte(u.sharedWith), &ids); err != nil {
		return fmt.Errorf("whom upstream %s is shared with: %w", u.id, err)
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM upstream_shares WHERE upstream = ?`, u.seq); err != nil {
		return err
	}
	for _, id := range ids {
		res, err := tx.ExecContext(ctx, `
			INSERT INTO upstream_shares (upstream, project) SELECT ?1, seq FROM projects WHERE id = ?2 AND deleted_at IS NULL AND seq <> ?3`, u.seq, id, u.project)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n != 1 {
			return &fieldError{"shared_with", "names " + clip(id, 64) + ", which is no other project"}
		}
	}
	return bumpSharedVersions(ctx, tx, u.seq, now)
}

func bumpSharedVersions(ctx context.Context, tx *sql.Tx, upstream, now int64) error {
	_, err := tx.ExecContext(ctx, `
		UPDATE projects SET version = version + 1, updated_at = ?
		WHERE deleted_at IS NULL AND seq IN (SELECT project FROM upstream_shares WHERE upstream = ?)`, now, upstream)
	return err
}
