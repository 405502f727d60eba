// This file has the SQL for projects, their upstreams and the health of these, and the prices that administrators set.
// Contracts: a missing row is errNotFound, an outdated version errStale, a name in use errTaken. Every change goes
// through withAuditedTx.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// A projectRow is a project as stored.
type projectRow struct {
	seq                  int64
	id, name             string
	active               bool
	policy, routing      string // JSON
	costMultiplier       int64  // in ten-thousandths
	deletedAt            *int64
	version              int64
	createdAt, updatedAt int64
	binding
}

const (
	projectEditable = `name, is_active, policy, routing, cost_multiplier, deleted_at, version, updated_at, bound_by,
		mac`
	projectColumns = `seq, id, created_at, ` + projectEditable
	selectProjects = `SELECT ` + projectColumns + ` FROM projects `
)

// editable returns the columns that a change may write.
func (p *projectRow) editable() []any {
	return []any{&p.name, &p.active, &p.policy, &p.routing, &p.costMultiplier, &p.deletedAt, &p.version,
		&p.updatedAt, &p.boundBy, &p.mac}
}

// bound covers inactive projects too: a change of one must not come into force when it is activated.
func (p *projectRow) bound() boundContent {
	b := boundContent{binding: &p.binding, kind: "project", id: p.id}
	if p.deletedAt == nil {
		b.values = []any{p.name, p.active, p.policy, p.routing, p.createdAt}
		if p.costMultiplier != multiplierOne {
			b.values = append(b.values, p.costMultiplier)
		}
	}
	return b
}

func (p *projectRow) columns() []any {
	return append([]any{&p.seq, &p.id, &p.createdAt}, p.editable()...)
}

func (p *projectRow) versionFields() (version, updatedAt *int64) { return &p.version, &p.updatedAt }

// auditFields are what the audit trail records of a project.
func (p *projectRow) auditFields() []auditField {
	return []auditField{{"name", p.name}, {"is_active", p.active}, {"policy", json.RawMessage(p.policy)},
		{"routing", json.RawMessage(p.routing)},
		{"cost_multiplier", json.Number(formatDecimal(p.costMultiplier, 4))}}
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
	sharedWith                  string // JSON, a list of ids of other projects
	active                      bool
	deletedAt                   *int64
	version                     int64
	createdAt, updatedAt        int64
	binding
	foreign error // not nil: this program did not write the row, or not that it is shared
}

const (
	upstreamEditable = `name, base_url, sealed_key, key_hint, organization, openai_project, weight, priority,
		models, rewrite, settings, is_active, deleted_at, version, updated_at, bound_by, mac`
	selectUpstreams = `SELECT seq, id, project, (SELECT p.id FROM projects p WHERE p.seq = upstreams.project),
		(SELECT json_group_array(id) FROM (
			SELECT o.id FROM upstream_shares s JOIN projects o ON o.seq = s.project
			WHERE s.upstream = upstreams.seq AND o.deleted_at IS NULL ORDER BY o.id) others),
		provider, created_at, ` + upstreamEditable + ` FROM upstreams `
)

// editable returns the columns that a change may write.
func (u *upstreamRow) editable() []any {
	return []any{&u.name, &u.baseURL, &u.sealedKey, &u.keyHint, &u.organization, &u.openaiProject, &u.weight,
		&u.priority, &u.models, &u.rewrite, &u.settings, &u.active, &u.deletedAt, &u.version, &u.updatedAt,
		&u.boundBy, &u.mac}
}

// bound does not cover sharedWith, whose rows are bound for themselves.
func (u *upstreamRow) bound() boundContent {
	b := boundContent{binding: &u.binding, kind: "upstream", id: u.id, projectID: u.projectID}
	if u.deletedAt == nil {
		b.values = []any{u.name, u.provider, u.baseURL, u.sealedKey, u.organization, u.openaiProject, u.weight,
			u.priority, u.models, u.rewrite, u.settings, u.active, u.createdAt}
	}
	return b
}

// A shareRow says that an upstream serves another project too.
type shareRow struct {
	upstream, project     int64
	upstreamID, projectID string
	ownerID               string // the project that has the upstream
	binding
}

const selectShares = `SELECT s.upstream, s.project, u.id, p.id, (SELECT o.id FROM projects o WHERE o.seq = u.project),
		s.bound_by, s.mac
	FROM upstream_shares s JOIN upstreams u ON u.seq = s.upstream JOIN projects p ON p.seq = s.project `

func (r *shareRow) columns() []any {
	return []any{&r.upstream, &r.project, &r.upstreamID, &r.projectID, &r.ownerID, &r.boundBy, &r.mac}
}

func (r *shareRow) bound() boundContent {
	return boundContent{binding: &r.binding, kind: "upstream", id: r.upstreamID, projectID: r.ownerID,
		values: []any{"shared with", r.projectID}}
}

func (u *upstreamRow) columns() []any {
	return append([]any{&u.seq, &u.id, &u.project, &u.projectID, &u.sharedWith, &u.provider, &u.createdAt},
		u.editable()...)
}

func (u *upstreamRow) versionFields() (version, updatedAt *int64) { return &u.version, &u.updatedAt }

// auditFields are what the audit trail records of an upstream. Of its key that is the hint, and a
// fingerprint which distinguishes two keys with the same hint.
func (u *upstreamRow) auditFields() []auditField {
	var key any
	if len(u.sealedKey) > 0 {
		fingerprint := sha256.Sum256(u.sealedKey)
		key = map[string]string{"hint": u.keyHint, "sealed": hex.EncodeToString(fingerprint[:4])}
	}
	return []auditField{{"name", u.name}, {"provider", u.provider}, {"base_url", u.baseURL}, {"api_key", key},
		{"organization", u.organization}, {"openai_project", u.openaiProject}, {"weight", u.weight},
		{"priority", u.priority}, {"models", json.RawMessage(u.models)},
		{"rewrite", json.RawMessage(u.rewrite)}, {"settings", json.RawMessage(u.settings)},
		{"shared_with", json.RawMessage(u.sharedWith)}, {"is_active", u.active}}
}

// auditEvent returns what happened to an upstream. oldFields are its fields before, nil if it is new.
func (u *upstreamRow) auditEvent(action string, oldFields []auditField) auditEvent {
	detail := []auditField{{"project_id", u.projectID}}
	return auditEvent{action, u.id, append(detail, diffAuditFields(oldFields, u.auditFields())...)}
}

// addProject stores a new project and its upstreams. It fills in what the database
// decides.
func (s *store) addProject(ctx context.Context, origin auditOrigin, p *projectRow, upstreams ...*upstreamRow) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		p.version = 1
		tx.bind(p)
		err := tx.QueryRowContext(ctx, `
			INSERT INTO projects (id, created_at, `+projectEditable+`)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING seq`,
			p.columns()[1:]...).Scan(&p.seq)
		event := auditEvent{"project.create", p.id, diffAuditFields(nil, p.auditFields())}
		if err != nil {
			return event, mapUniqueViolation(err)
		}
		for i, up := range upstreams {
			up.project = p.seq
			name := "upstream"
			if i > 0 {
				name += strconv.Itoa(i + 1)
			}
			event.detail = append(event.detail, auditField{name, up.id})
			for _, f := range diffAuditFields(nil, up.auditFields()) {
				event.detail = append(event.detail, auditField{name + "." + f.name, f.value})
			}
			if err := insertUpstream(ctx, tx, up); err != nil {
				return event, mapUniqueViolation(err)
			}
		}
		return event, nil
	})
}

func (s *store) projectByID(ctx context.Context, id string) (projectRow, error) {
	return projectByID(ctx, s.readDB, id)
}

func projectByID(ctx context.Context, db querier, id string) (projectRow, error) {
	return queryRow(ctx, db, (*projectRow).columns, selectProjects+`WHERE id = ? AND deleted_at IS NULL`, id)
}

// projectBySeq returns a project, which may be deleted. A foreign row does not count.
func (s *store) projectBySeq(ctx context.Context, seq int64) (projectRow, error) {
	return queryBoundRow(ctx, s, (*projectRow).columns, selectProjects+`WHERE seq = ?`, seq)
}

// projectVersions returns the versions of projects, by seq.
func (s *store) projectVersions(ctx context.Context, seqs []int64) (map[int64]int64, error) {
	return collectMap[int64, int64](ctx, s.readDB, "reading the versions of projects",
		`SELECT seq, version FROM projects WHERE seq IN (SELECT CAST(value AS BIGINT) FROM json_each(CAST(? AS TEXT)))`,
		string(mustMarshal(seqs)))
}

// countProjects counts deleted ones too: it answers whether the database was ever used.
func (s *store) countProjects(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting projects", `SELECT count(*) FROM projects`)
}

// changeProject is changeRow for a project.
func (s *store) changeProject(ctx context.Context, origin auditOrigin, id string, version, now int64,
	edit func(*projectRow) error) (projectRow, error) {
	load := func(tx *auditedTx) (projectRow, error) { return projectByID(ctx, tx, id) }
	save := func(tx *auditedTx, old, p *projectRow) (auditEvent, error) {
		return auditEvent{"project.change", p.id, diffAuditFields(old.auditFields(), p.auditFields())},
			p.save(ctx, tx)
	}
	return changeRow(ctx, s, origin, version, now, load, edit, save)
}

// save writes the columns that a change may write.
func (p *projectRow) save(ctx context.Context, tx *auditedTx) error {
	tx.bind(p)
	_, err := tx.ExecContext(ctx, `
		UPDATE projects SET (`+projectEditable+`) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE seq = ?`,
		append(p.editable(), p.seq)...)
	return err
}

// deleteProject takes a project out of use for good: it becomes inactive, its tokens are revoked, its
// provider keys are wiped, and its name becomes free. Its rows stay, because the ledger refers to them.
// Deleting it twice is errNotFound.
func (s *store) deleteProject(ctx context.Context, origin auditOrigin, id string, version, now int64,
) (p projectRow, err error) {
	err = s.withAuditedTx(ctx, origin, func(tx *auditedTx) (event auditEvent, err error) {
		if p, err = projectByID(ctx, tx, id); err != nil {
			return event, err
		}
		if version != 0 && version != p.version {
			return event, errStale
		}
		event = auditEvent{"project.delete", id, []auditField{{"name", p.name}}}
		if p, err = queryRow(ctx, tx, (*projectRow).columns, `
			UPDATE projects SET deleted_at = ?1, is_active = FALSE, version = version + 1, updated_at = ?1,
				mac = zeroblob(0), name = name || ' (deleted ' || id || ')'
			WHERE seq = ?2 RETURNING `+projectColumns, now, p.seq); err != nil {
			return event, err
		}
		for _, step := range []struct{ name, query string }{{"tokens", `
			UPDATE tokens SET revoked_at = ?1, version = version + 1, updated_at = ?1, mac = zeroblob(0)
			WHERE project = ?2 AND revoked_at IS NULL`}, {"", `
			UPDATE projects SET version = version + 1, updated_at = ?1
			WHERE deleted_at IS NULL AND seq IN (
				SELECT s.project FROM upstreams u JOIN upstream_shares s ON s.upstream = u.seq
				WHERE u.project = ?2)`}, {"upstreams", `
			UPDATE upstreams SET deleted_at = ?1, sealed_key = zeroblob(0), is_active = FALSE, version = version + 1,
				updated_at = ?1, mac = zeroblob(0)
			WHERE project = ?2 AND deleted_at IS NULL`},
		} {
			n, err := execCount(ctx, tx, "deleting a project", step.query, now, p.seq)
			if err != nil {
				return event, err
			}
			if step.name != "" {
				event.detail = append(event.detail, auditField{step.name, n})
			}
		}
		return event, nil
	})
	return p, err
}

// firstUnrevokedToken returns the seq of a project's first token that is not revoked, or a seq above those of all its
// tokens. The tokens with a lower seq are revoked for good; the result never decreases.
func (s *store) firstUnrevokedToken(ctx context.Context, project int64) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "looking for a project's first valid token", `
		SELECT coalesce((SELECT seq FROM tokens WHERE project = ?1 AND revoked_at IS NULL ORDER BY seq LIMIT 1),
			(SELECT max(seq) + 1 FROM tokens WHERE project = ?1), 0)`, project)
}

// addUpstream stores a new upstream of the project with seq u.project. It bumps the project's version,
// because what the project does has changed.
func (s *store) addUpstream(ctx context.Context, origin auditOrigin, u *upstreamRow, now int64) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		if err := bumpProjectVersion(ctx, tx, u.project, now); err != nil {
			return auditEvent{}, err
		}
		return u.auditEvent("upstream.create", nil), insertUpstream(ctx, tx, u)
	})
}

func insertUpstream(ctx context.Context, tx *auditedTx, u *upstreamRow) error {
	u.version = 1
	tx.bind(u)
	err := tx.QueryRowContext(ctx, `
		INSERT INTO upstreams (id, project, provider, created_at, `+upstreamEditable+`)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING seq`,
		append([]any{u.id, u.project, u.provider, u.createdAt}, u.editable()...)...).Scan(&u.seq)
	if err != nil {
		return err
	}
	return u.saveSharing(ctx, tx, u.createdAt)
}

// bumpProjectVersion bumps a project's version. It returns errNotFound if the project is deleted: such a
// project must not get a key, because nobody would wipe it any more.
func bumpProjectVersion(ctx context.Context, tx querier, project, now int64) error {
	return mapNoRows(tx.QueryRowContext(ctx, `
		UPDATE projects SET version = version + 1, updated_at = ? WHERE seq = ? AND deleted_at IS NULL RETURNING seq`,
		now, project).Scan(&project))
}

// projectUpstreams returns a project's own upstreams in the order of preference: priority, then age.
func (s *store) projectUpstreams(ctx context.Context, project int64) ([]upstreamRow, error) {
	return collect(ctx, s.readDB, "listing upstreams", (*upstreamRow).columns, selectUpstreams+`
		WHERE project = ? AND deleted_at IS NULL ORDER BY priority, seq LIMIT 1000`, project)
}

// usableUpstreams returns the upstreams that a project's calls may use, its own and those shared with it, in
// the order of preference. It checks their bindings.
func (s *store) usableUpstreams(ctx context.Context, project int64) (all []upstreamRow, err error) {
	err = s.withReadTx(ctx, func(db querier) error {
		all, err = collect(ctx, db, "listing a project's upstreams", (*upstreamRow).columns, selectUpstreams+`
			WHERE seq IN (SELECT seq FROM upstreams WHERE project = ?1
					UNION SELECT upstream FROM upstream_shares WHERE project = ?1)
				AND deleted_at IS NULL ORDER BY priority, seq LIMIT 1000`, project)
		for i := range all {
			all[i].foreign = s.checkUsable(ctx, db, &all[i], project)
			if bad := all[i].foreign; bad != nil && !errors.Is(bad, errNotFound) {
				return bad // such as that the client has left, which says nothing about the row
			}
		}
		return err
	})
	return all, err
}

// checkUsable checks the bindings of an upstream and, unless the project owns it, of its share.
func (s *store) checkUsable(ctx context.Context, db querier, u *upstreamRow, project int64) error {
	if err := s.checkBinding(ctx, db, u); err != nil || u.project == project {
		return err
	}
	share, err := queryRow(ctx, db, (*shareRow).columns, selectShares+`WHERE s.upstream = ? AND s.project = ?`,
		u.seq, project)
	if err != nil {
		return err
	}
	return s.checkBinding(ctx, db, &share)
}

func (s *store) upstreamByID(ctx context.Context, projectID, id string) (upstreamRow, error) {
	return upstreamByID(ctx, s.readDB, projectID, id)
}

func upstreamByID(ctx context.Context, db querier, projectID, id string) (upstreamRow, error) {
	return queryRow(ctx, db, (*upstreamRow).columns, selectUpstreams+`
		WHERE id = ? AND deleted_at IS NULL
			AND project = (SELECT seq FROM projects WHERE id = ? AND deleted_at IS NULL)`, id, projectID)
}

// changeUpstream is changeRow for an upstream. edit may also delete it, by returning true.
func (s *store) changeUpstream(ctx context.Context, origin auditOrigin, projectID, id string, version, now int64,
	edit func(*upstreamRow) (deleted bool, err error)) (upstreamRow, error) {
	action := "upstream.change"
	load := func(tx *auditedTx) (upstreamRow, error) { return upstreamByID(ctx, tx, projectID, id) }
	editOrDelete := func(u *upstreamRow) error {
		deleted, err := edit(u)
		if deleted {
			action, u.deletedAt = "upstream.delete", &now
		}
		return err
	}
	save := func(tx *auditedTx, old, u *upstreamRow) (auditEvent, error) {
		if err := u.save(ctx, tx, now); err != nil {
			return auditEvent{}, err
		}
		return u.auditEvent(action, old.auditFields()), bumpProjectVersion(ctx, tx, u.project, now)
	}
	return changeRow(ctx, s, origin, version, now, load, editOrDelete, save)
}

// save writes the columns that a change may write, and with whom the upstream is shared.
func (u *upstreamRow) save(ctx context.Context, tx *auditedTx, now int64) error {
	tx.bind(u)
	if _, err := tx.ExecContext(ctx, `
		UPDATE upstreams SET (`+upstreamEditable+`) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		WHERE seq = ?`,
		append(u.editable(), u.seq)...); err != nil {
		return err
	}
	return u.saveSharing(ctx, tx, now)
}

// sharedProjects returns the seqs of the projects that an upstream is shared with.
func (s *store) sharedProjects(ctx context.Context, upstream int64) ([]int64, error) {
	return collect(ctx, s.readDB, "reading with whom an upstream is shared", single[int64],
		`SELECT project FROM upstream_shares WHERE upstream = ?`, upstream)
}

// saveSharing writes with which projects an upstream is shared, and bumps the versions of all projects that
// had the upstream before or have it now.
func (u *upstreamRow) saveSharing(ctx context.Context, tx *auditedTx, now int64) error {
	if err := bumpSharedVersions(ctx, tx, u.seq, now); err != nil {
		return err
	}
	var ids []string
	if err := json.Unmarshal([]byte(u.sharedWith), &ids); err != nil {
		return fmt.Errorf("reading with whom upstream %s is shared: %w", u.id, err)
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM upstream_shares WHERE upstream = ?`, u.seq); err != nil {
		return err
	}
	for _, id := range ids {
		r := &shareRow{upstreamID: u.id, projectID: id, ownerID: u.projectID}
		tx.bind(r)
		n, err := execCount(ctx, tx, "sharing an upstream", `
			INSERT INTO upstream_shares (upstream, project, bound_by, mac)
			SELECT ?1, seq, ?4, ?5 FROM projects WHERE id = ?2 AND deleted_at IS NULL AND seq <> ?3`,
			u.seq, id, u.project, r.boundBy, r.mac)
		if err != nil {
			return err
		}
		if n != 1 {
			return &fieldError{"shared_with", "names " + clip(id, 64) + ", which is no other project"}
		}
	}
	return bumpSharedVersions(ctx, tx, u.seq, now)
}

func bumpSharedVersions(ctx context.Context, tx querier, upstream, now int64) error {
	_, err := tx.ExecContext(ctx, `
		UPDATE projects SET version = version + 1, updated_at = ?
		WHERE deleted_at IS NULL AND seq IN (SELECT project FROM upstream_shares WHERE upstream = ?)`, now, upstream)
	return err
}

// A priceRow is a price that an administrator set.
type priceRow struct {
	id, match string
	validFrom int64  // 0: always
	price     string // JSON, in the form of prices.json
	updatedAt int64
}

const priceColumns = `id, match, valid_from, price, updated_at`

func (p *priceRow) columns() []any {
	return []any{&p.id, &p.match, &p.validFrom, &p.price, &p.updatedAt}
}

// auditFields are what the audit trail records of a price.
func (p *priceRow) auditFields() []auditField {
	fields := []auditField{{"match", p.match}, {"valid_from", nil}}
	if p.validFrom != 0 {
		fields[1].value = auditTime(&p.validFrom)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal([]byte(p.price), &members); err != nil {
		return append(fields, auditField{"price", p.price})
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		fields = append(fields, auditField{name, members[name]})
	}
	return fields
}

// setPrice stores a price. It replaces one with the same match and time, whose id stays.
func (s *store) setPrice(ctx context.Context, origin auditOrigin, p *priceRow) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		var oldFields []auditField
		old, err := queryRow(ctx, tx, (*priceRow).columns, `
			SELECT `+priceColumns+` FROM prices WHERE match = ? AND valid_from = ?`, p.match, p.validFrom)
		if err == nil {
			oldFields = old.auditFields()
		} else if !errors.Is(err, errNotFound) {
			return auditEvent{}, err
		}
		err = tx.QueryRowContext(ctx, `
			INSERT INTO prices (`+priceColumns+`) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT (match, valid_from) DO UPDATE SET price = excluded.price, updated_at = excluded.updated_at
			RETURNING id`, p.columns()...).Scan(&p.id)
		fields := p.auditFields()
		for _, f := range oldFields {
			if !slices.ContainsFunc(fields, func(g auditField) bool { return g.name == f.name }) {
				fields = append(fields, auditField{f.name, nil}) // it is no longer priced
			}
		}
		return auditEvent{"price.set", p.id, diffAuditFields(oldFields, fields)}, err
	})
}

func (s *store) deletePrice(ctx context.Context, origin auditOrigin, id string) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		old, err := queryRow(ctx, tx, (*priceRow).columns, `
			DELETE FROM prices WHERE id = ? RETURNING `+priceColumns, id)
		return auditEvent{"price.delete", id, diffAuditFields(old.auditFields(), nil)}, err
	})
}

func (s *store) listPrices(ctx context.Context) ([]priceRow, error) {
	return collect(ctx, s.readDB, "listing prices", (*priceRow).columns,
		`SELECT `+priceColumns+` FROM prices ORDER BY match, valid_from LIMIT 10000`)
}

// listUnhealthy returns the health of every upstream in use that is not ready.
func (s *store) listUnhealthy(ctx context.Context) ([]healthRow, error) {
	type stored struct {
		healthRow
		stateName string
	}
	rows, err := collect(ctx, s.readDB, "reading the health of upstreams", func(r *stored) []any {
		return []any{&r.upstream, &r.id, &r.stateName, &r.until, &r.strikes, &r.reason, &r.changedAt}
	}, `SELECT h.upstream, u.id, h.state, h.until, h.strikes, h.reason, h.changed_at
		FROM upstream_health h JOIN upstreams u ON u.seq = h.upstream WHERE u.deleted_at IS NULL LIMIT 100000`)
	var out []healthRow
	for _, r := range rows {
		r.state = keyState(max(0, slices.Index(keyStateNames(), r.stateName)))
		r.until, r.changedAt = r.until-s.clockOffset(), r.changedAt-s.clockOffset()
		out = append(out, r.healthRow)
	}
	return out, err
}

// An unhealthyUpstream is an upstream that is not ready, with the names that an administrator knows.
type unhealthyUpstream struct {
	project, projectID, upstream string
	state, reason                string
	until, since                 int64
}

// unhealthyUpstreams returns up to limit upstreams in use that calls skip at now, those that need attention
// first.
func (s *store) unhealthyUpstreams(ctx context.Context, now int64, limit int) ([]unhealthyUpstream, error) {
	return collect(ctx, s.readDB, "listing unhealthy upstreams", func(u *unhealthyUpstream) []any {
		return []any{&u.project, &u.projectID, &u.upstream, &u.state, &u.reason, &u.until, &u.since}
	}, `SELECT p.name, p.id, u.name, h.state, h.reason, h.until, h.changed_at
		FROM upstream_health h JOIN upstreams u ON u.seq = h.upstream JOIN projects p ON p.seq = u.project
		WHERE u.deleted_at IS NULL AND u.is_active AND p.deleted_at IS NULL
			AND (h.state <> 'cooling' OR h.until > ?)
		ORDER BY CASE h.state WHEN 'quarantined' THEN 0 WHEN 'exhausted' THEN 1 WHEN 'open' THEN 2 ELSE 3 END,
			h.changed_at
		LIMIT ?`, now, limit)
}
