// This file has the SQL for the credentials of this program: the tokens that clients present (store_lists.go lists
// them), and management keys; for sessions; and it reads what values have used of limits with for_each, which the
// ledger writes.
// Every change goes through withAuditedTx. The columns request_count and last_used_at of a token belong to the ledger,
// which changes them by x = x + ? only: nothing here writes them.
package main

import (
	"bytes"
	"context"
	"encoding/json"
)

// A tokenRow is a token as stored. Pointers are nil where the column is NULL.
type tokenRow struct {
	seq                  int64
	id                   string
	project              int64
	projectID            string
	name                 string
	hash, oldHash        []byte
	oldHashUntil         *int64
	expiresAt            *int64
	endsAt               int64 // expiresAt, or neverExpires
	idleExpiry           *int64
	revokedAt            *int64
	maxRequests          *int64
	requestCount         int64
	policy               string
	version              int64
	lastUsedAt           *int64
	createdAt, updatedAt int64
	binding
}

// neverExpires is the end of a token that has none; see schema/009.
const neverExpires = 9_000_000_000_000_000

const (
	tokenEditable = `name, hash, old_hash, old_hash_until, expires_at, idle_expiry, revoked_at,
		max_requests, policy, version, updated_at, bound_by, mac`
	tokenColumns = `seq, id, project, (SELECT p.id FROM projects p WHERE p.seq = tokens.project),
		created_at, request_count, last_used_at, ends_at, ` + tokenEditable
	selectTokens = `SELECT ` + tokenColumns + ` FROM tokens `
)

// editable returns the columns that a change may write.
func (t *tokenRow) editable() []any {
	return []any{&t.name, &t.hash, &t.oldHash, &t.oldHashUntil, &t.expiresAt, &t.idleExpiry, &t.revokedAt,
		&t.maxRequests, &t.policy, &t.version, &t.updatedAt, &t.boundBy, &t.mac}
}

// bound does not cover what the ledger counts, and what grants nothing. A revoked token needs no MAC, so that many
// can be revoked with one statement.
func (t *tokenRow) bound() boundContent {
	b := boundContent{binding: &t.binding, kind: "token", id: t.id, projectID: t.projectID}
	if t.revokedAt == nil {
		b.values = []any{t.name, t.hash, t.oldHash, t.oldHashUntil, t.expiresAt, t.idleExpiry, t.maxRequests,
			t.policy, t.createdAt}
	}
	return b
}

func (t *tokenRow) columns() []any {
	return append([]any{&t.seq, &t.id, &t.project, &t.projectID, &t.createdAt, &t.requestCount, &t.lastUsedAt,
		&t.endsAt}, t.editable()...)
}

func (t *tokenRow) versionFields() (version, updatedAt *int64) { return &t.version, &t.updatedAt }

// addToken stores a new token of the project with id t.projectID and fills in what the database decides. It
// returns errNotFound if there is no such project, and errTaken if the id or the hash is taken.
func (s *store) addToken(ctx context.Context, origin auditOrigin, t *tokenRow) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		t.version = 1
		tx.bind(t)
		err := tx.QueryRowContext(ctx, `
			INSERT INTO tokens (project, id, created_at, `+tokenEditable+`)
			SELECT seq, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM projects WHERE id = ? AND deleted_at IS NULL
			RETURNING seq, project`,
			append(append([]any{t.id, t.createdAt}, t.editable()...), t.projectID)...).Scan(&t.seq, &t.project)
		return t.auditEvent("token.create", nil), mapNoRows(mapUniqueViolation(err))
	})
}

// auditFields are what the audit trail records of a token. The hashes are not among them: a rotation is an
// action of its own.
func (t *tokenRow) auditFields() []auditField {
	var idleMinutes *int64
	if t.idleExpiry != nil {
		idleMinutes = new(*t.idleExpiry / 60_000)
	}
	return []auditField{{"name", t.name}, {"expires_at", auditTime(t.expiresAt)}, {"idle_expiry_minutes", idleMinutes},
		{"max_requests", t.maxRequests}, {"policy", json.RawMessage(t.policy)},
		{"overlap_until", auditTime(t.oldHashUntil)}, {"revoked_at", auditTime(t.revokedAt)}}
}

// auditEvent returns what happened to a token. old is the token before, nil if this one is new.
func (t *tokenRow) auditEvent(action string, old *tokenRow) auditEvent {
	var oldFields []auditField
	if old != nil {
		oldFields = old.auditFields()
	}
	detail := []auditField{{"project_id", t.projectID}}
	return auditEvent{action, t.id, append(detail, diffAuditFields(oldFields, t.auditFields())...)}
}

// changeAction names a change by its effect.
func (t *tokenRow) changeAction(old *tokenRow) string {
	switch {
	case t.revokedAt != nil:
		return "token.revoke"
	case !bytes.Equal(t.hash, old.hash):
		return "token.rotate"
	}
	return "token.change"
}

// tokenByHash returns the token with a hash, which may be the one from before its last rotation. It does not
// check whether the token is valid. A foreign row does not count.
func (s *store) tokenByHash(ctx context.Context, hash [32]byte) (tokenRow, error) {
	return queryBoundRow(ctx, s, (*tokenRow).columns,
		selectTokens+`WHERE hash = ?1 UNION ALL `+selectTokens+`WHERE old_hash = ?1`, hash[:])
}

func (s *store) tokenByID(ctx context.Context, id string) (tokenRow, error) {
	return tokenByID(ctx, s.readDB, id)
}

// boundTokenByID is tokenByID, but a foreign row does not count.
func (s *store) boundTokenByID(ctx context.Context, id string) (tokenRow, error) {
	return queryBoundRow(ctx, s, (*tokenRow).columns, selectTokens+`WHERE id = ?`, id)
}

func tokenByID(ctx context.Context, db querier, id string) (tokenRow, error) {
	return queryRow(ctx, db, (*tokenRow).columns, selectTokens+`WHERE id = ?`, id)
}

// changeToken is changeRow for a token.
func (s *store) changeToken(ctx context.Context, origin auditOrigin, id string, version, now int64,
	edit func(*tokenRow) error) (tokenRow, error) {
	load := func(tx *auditedTx) (tokenRow, error) { return tokenByID(ctx, tx, id) }
	save := func(tx *auditedTx, old, t *tokenRow) (auditEvent, error) {
		return t.auditEvent(t.changeAction(old), old), t.save(ctx, tx)
	}
	return changeRow(ctx, s, origin, version, now, load, edit, save)
}

// save writes the columns that a change may write.
func (t *tokenRow) save(ctx context.Context, tx *auditedTx) error {
	tx.bind(t)
	_, err := tx.ExecContext(ctx, `
		UPDATE tokens SET (`+tokenEditable+`) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE seq = ?`,
		append(t.editable(), t.seq)...)
	return err
}

// revokeTokens revokes all tokens of a project that are not revoked yet and returns how many.
func (s *store) revokeTokens(ctx context.Context, origin auditOrigin, project string, now int64) (n int64, err error) {
	err = s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		n, err = execCount(ctx, tx, "revoking tokens", `
			UPDATE tokens SET revoked_at = ?1, version = version + 1, updated_at = ?1, mac = zeroblob(0)
			WHERE revoked_at IS NULL AND project = (SELECT seq FROM projects WHERE id = ?2)`, now, project)
		return auditEvent{"project.revoke_tokens", project, []auditField{{"tokens", n}}}, err
	})
	return n, err
}

// A managementKeyRow is a management key as stored.
type managementKeyRow struct {
	seq                  int64
	id, name             string
	hash                 []byte
	role                 string
	expiresAt, revokedAt *int64
	version              int64
	createdAt, updatedAt int64
	binding
}

const (
	managementKeyEditable = `name, role, expires_at, revoked_at, version, updated_at, bound_by, mac`
	selectManagementKeys  = `SELECT seq, id, hash, created_at, ` + managementKeyEditable + ` FROM management_keys `
)

// editable returns the columns that a change may write.
func (k *managementKeyRow) editable() []any {
	return []any{&k.name, &k.role, &k.expiresAt, &k.revokedAt, &k.version, &k.updatedAt, &k.boundBy, &k.mac}
}

func (k *managementKeyRow) bound() boundContent {
	b := boundContent{binding: &k.binding, kind: "key", id: k.id}
	if k.revokedAt == nil {
		b.values = []any{k.name, k.hash, k.role, k.expiresAt, k.createdAt}
	}
	return b
}

func (k *managementKeyRow) columns() []any {
	return append([]any{&k.seq, &k.id, &k.hash, &k.createdAt}, k.editable()...)
}

func (k *managementKeyRow) versionFields() (version, updatedAt *int64) {
	return &k.version, &k.updatedAt
}

// auditFields are what the audit trail records of a management key.
func (k *managementKeyRow) auditFields() []auditField {
	return []auditField{{"name", k.name}, {"role", k.role}, {"expires_at", auditTime(k.expiresAt)},
		{"revoked_at", auditTime(k.revokedAt)}}
}

// addManagementKey stores a new key and fills in what the database decides.
func (s *store) addManagementKey(ctx context.Context, origin auditOrigin, k *managementKeyRow) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		k.version = 1
		tx.bind(k)
		err := tx.QueryRowContext(ctx, `
			INSERT INTO management_keys (id, hash, created_at, `+managementKeyEditable+`)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING seq`,
			k.columns()[1:]...).Scan(&k.seq)
		return auditEvent{"key.create", k.id, diffAuditFields(nil, k.auditFields())}, mapUniqueViolation(err)
	})
}

func (s *store) managementKeyByHash(ctx context.Context, hash [32]byte) (managementKeyRow, error) {
	return queryBoundRow(ctx, s, (*managementKeyRow).columns, selectManagementKeys+`WHERE hash = ?`, hash[:])
}

func (s *store) managementKeyByID(ctx context.Context, id string) (managementKeyRow, error) {
	return managementKeyByID(ctx, s.readDB, id)
}

func managementKeyByID(ctx context.Context, db querier, id string) (managementKeyRow, error) {
	return queryRow(ctx, db, (*managementKeyRow).columns, selectManagementKeys+`WHERE id = ?`, id)
}

// countManagementKeys counts revoked and expired ones too.
func (s *store) countManagementKeys(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting management keys", `SELECT count(*) FROM management_keys`)
}

func (s *store) listManagementKeys(ctx context.Context, after int64, limit int) ([]managementKeyRow, error) {
	return collect(ctx, s.readDB, "listing management keys", (*managementKeyRow).columns,
		selectManagementKeys+`WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
}

// changeManagementKey is changeRow for a management key.
func (s *store) changeManagementKey(ctx context.Context, origin auditOrigin, id string, version, now int64,
	edit func(*managementKeyRow) error) (managementKeyRow, error) {
	load := func(tx *auditedTx) (managementKeyRow, error) { return managementKeyByID(ctx, tx, id) }
	save := func(tx *auditedTx, old, k *managementKeyRow) (auditEvent, error) {
		action := "key.change"
		if k.revokedAt != nil {
			action = "key.revoke"
		}
		return auditEvent{action, k.id, diffAuditFields(old.auditFields(), k.auditFields())}, k.save(ctx, tx)
	}
	return changeRow(ctx, s, origin, version, now, load, edit, save)
}

// save writes the columns that a change may write.
func (k *managementKeyRow) save(ctx context.Context, tx *auditedTx) error {
	tx.bind(k)
	_, err := tx.ExecContext(ctx, `
		UPDATE management_keys SET (`+managementKeyEditable+`) = (?, ?, ?, ?, ?, ?, ?, ?) WHERE seq = ?`,
		append(k.editable(), k.seq)...)
	return err
}

// A sessionRow is a session as stored. name and role are those that its management key has now; keyValid
// means that the key is neither revoked nor expired. For MANAGEMENT_TOKEN the three are zero:
// admin_session.go checks that one.
type sessionRow struct {
	hash, proof       []byte
	key, address      string
	createdAt, seenAt int64
	binding

	name, role string
	keyValid   bool
}

func (r *sessionRow) bound() boundContent {
	return boundContent{binding: &r.binding, kind: "session", id: r.key,
		values: []any{r.hash, r.proof, r.address, r.createdAt}}
}

const selectSessions = `
	SELECT s.hash, s.key, s.proof, s.address, s.created_at, s.seen_at, s.bound_by, s.mac,
		coalesce(k.name, ''), coalesce(k.role, ''),
		k.id IS NOT NULL AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > ?1)
	FROM sessions s LEFT JOIN management_keys k ON k.id = s.key `

func (r *sessionRow) columns() []any {
	return []any{&r.hash, &r.key, &r.proof, &r.address, &r.createdAt, &r.seenAt, &r.boundBy, &r.mac, &r.name, &r.role,
		&r.keyValid}
}

// sessionByHash does not check whether the session has expired. Without a key that is bound, it is not valid.
func (s *store) sessionByHash(ctx context.Context, hash [32]byte, now int64) (sessionRow, error) {
	row, err := queryBoundRow(ctx, s, (*sessionRow).columns, selectSessions+`WHERE s.hash = ?2`, now, hash[:])
	if err == nil && row.keyValid {
		_, err = queryBoundRow(ctx, s, (*managementKeyRow).columns, selectManagementKeys+`WHERE id = ?`, row.key)
	}
	return row, err
}

// sessionsByKey lists a key's sessions that were used at or after since, newest first.
func (s *store) sessionsByKey(ctx context.Context, key string, now, since int64) ([]sessionRow, error) {
	return collect(ctx, s.readDB, "listing sessions", (*sessionRow).columns, selectSessions+`
		WHERE s.key = ?2 AND s.seen_at >= ?3 ORDER BY s.created_at DESC LIMIT ?4`, now, key, since, maxSessions)
}

// maxSessions bounds the sessions of one key: a further one ends the oldest.
const maxSessions = 50

// addSession stores a new session and ends those created before createdBefore, the key's oldest beyond
// maxSessions, and the one with replacedHash (nil: none).
func (s *store) addSession(ctx context.Context, origin auditOrigin, row *sessionRow,
	createdBefore int64, replacedHash []byte) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		if err := execute(ctx, tx, "ending old sessions", `
			DELETE FROM sessions WHERE created_at < ? OR hash = ?`, createdBefore, replacedHash); err != nil {
			return auditEvent{}, err
		}
		err := execute(ctx, tx, "ending the key's oldest sessions", `
			DELETE FROM sessions WHERE hash IN (
				SELECT hash FROM sessions WHERE key = ? ORDER BY created_at DESC
				LIMIT 9223372036854775807 OFFSET ?)`,
			row.key, maxSessions-1)
		if err != nil {
			return auditEvent{}, err
		}
		tx.bind(row)
		_, err = tx.ExecContext(ctx, `
			INSERT INTO sessions (hash, key, proof, address, created_at, seen_at, bound_by, mac)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?)`, row.columns()[:8]...)
		return auditEvent{action: actionSignIn, object: row.key}, err
	})
}

// endSession ends one session of origin's actor.
func (s *store) endSession(ctx context.Context, origin auditOrigin, hash []byte) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		_, err := tx.ExecContext(ctx, `DELETE FROM sessions WHERE hash = ?`, hash)
		return auditEvent{action: actionSignOut, object: origin.actorID}, err
	})
}

// endKeySessions ends all sessions of a key.
func (s *store) endKeySessions(ctx context.Context, origin auditOrigin, key string) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		n, err := execCount(ctx, tx, "ending sessions", `DELETE FROM sessions WHERE key = ?`, key)
		return auditEvent{actionSignOut, key, []auditField{{"everywhere", true}, {"sessions", n}}}, err
	})
}

// policyTexts returns the policies of a project and a token, {} for one that does not exist.
func (s *store) policyTexts(ctx context.Context, project, token int64) (texts [2]string, err error) {
	err = scanRow(ctx, s.readDB, "reading policies", []any{&texts[0], &texts[1]}, `
		SELECT coalesce((SELECT policy FROM projects WHERE seq = ?), '{}'),
			coalesce((SELECT policy FROM tokens WHERE seq = ?), '{}')`, project, token)
	return texts, err
}

// reservedSince returns what was reserved for background responses whose usage is not known, of calls with an id of
// from or above, of a token or, with token 0, of a whole project. Their calls are in the sums, without usage.
func (s *store) reservedSince(ctx context.Context, project, token, from int64) ([]pastUsage, error) {
	return reservedSince(ctx, s.readDB, project, token, from)
}

func reservedSince(ctx context.Context, db querier, project, token, from int64) ([]pastUsage, error) {
	return collect(ctx, db, "reading what background responses have reserved", (*pastUsage).columns, `
		SELECT endpoint, CASE WHEN asked_tracked THEN asked ELSE ? END, 0, reserved_input, reserved_output,
			reserved_cost
		FROM background WHERE usage_source = '' AND project = ? AND CAST(? AS BIGINT) IN (0, token) AND call >= ?`,
		otherModels, project, token, from)
}

// How a limit's account counts.
const (
	leaseOfWindow = iota // what is used in a window adds up
	leaseOfBucket        // what is used falls again
	leaseOfSlots         // what is used comes back
)

// A leaseItem is what a replica reports of one counter to the limit's account, and what it asks for. The comment of
// ratelimit_leases.go says what the amounts mean.
type leaseItem struct {
	Index       int64  `json:"i"` // in the exchange
	Account     string `json:"account"`
	Project     int64  `json:"project"`
	Token       int64  `json:"token"`
	Rule        string `json:"rule"`
	Kind        int64  `json:"kind"`
	PeriodMS    int64  `json:"period"`  // of a bucket
	Version     int64  `json:"version"` // of the policy with the limit
	Max         int64  `json:"max"`
	WindowStart int64  `json:"window_start"`
	WindowEnd   int64  `json:"window_end"`  // the account may be deleted some time after it
	Incarnation int64  `json:"incarnation"` // of the account; 0: the counter joins it
	Base        *int64 `json:"base"`        // for a new account; nil: not known
	Added       bool   `json:"added"`       // an account that does not have Version yet is made again
	Spent       int64  `json:"spent"`       // in all
	Busy        int64  `json:"busy"`        // reserved by running calls
	Keep        int64  `json:"keep"`        // of what may be spent, with Busy
	Recent      int64  `json:"recent"`      // of Spent, the requests that began at RecentFrom or later
	RecentFrom  int64  `json:"recent_from"`
	Least       int64  `json:"least"` // what the call that needs least needs; 0: no call waits
	Need        int64  `json:"need"`  // of all calls that wait
	Want        int64  `json:"want"`  // beyond what is kept, to be lent if there is plenty
	Asked       bool   `json:"asked"` // the calls that wait have asked before

	joins int64 // how often the counter had joined its account
}

// A lateLeaseUse is what a call has used of an account beyond what was counted, in the window that begins at
// WindowStart. The transaction that records the usage adds it.
type lateLeaseUse struct {
	Account             string
	WindowStart, Amount int64
}

// The results of an item.
const (
	leaseDone        = iota
	leaseNeedsBase   // the account does not exist, and Base is nil
	leaseWindowOver  // the account is in a later window
	leaseWindowEarly // the window has not begun, by the database's clock
)

// A leaseReply is the answer to an item.
type leaseReply struct {
	item, status   int64
	incarnation    int64
	windowStart    int64
	spent, unspent int64
	others         int64 // what others have used; of slots, how many they use
	free           int64 // what is left of the limit
	level          int64 // of a bucket, multiplied by PeriodMS
	settled        bool  // no other replica has anything that it may still return
	recalled       bool  // others need what this replica does not use
}

// A leaseBackend is the accounts of limits in the database.
type leaseBackend struct {
	exchange       func(context.Context, []leaseItem) ([]leaseReply, error)
	giveBack       func(context.Context) error // ends all leases of this replica, all of which is reported
	deleteAccounts func(context.Context, []string) error
	// keepRules deletes the accounts of a token or, with token 0, of a project that count by other rules.
	keepRules     func(ctx context.Context, project, token int64, rules []string) error
	prune         func(ctx context.Context, before int64, limit int) (int64, error)
	countRequests func(ctx context.Context, token int64) (int64, error)
	pastUse       func(ctx context.Context, grain string, project, token, from int64,
	) ([]pastUsage, []requestRow, error)
}

// An expiringToken is a token that expires soon.
type expiringToken struct {
	seq                          int64
	id, name, project, projectID string
	expiresAt, createdAt         int64
}

// expiringTokens returns up to limit tokens that expire after the token after (by time and then seq) and before to, the
// first to expire first.
func (s *store) expiringTokens(ctx context.Context, after expiringToken, to int64, limit int,
) ([]expiringToken, error) {
	return collect(ctx, s.readDB, "listing tokens that expire", func(t *expiringToken) []any {
		return []any{&t.seq, &t.id, &t.name, &t.project, &t.projectID, &t.expiresAt, &t.createdAt}
	}, `SELECT t.seq, t.id, t.name, p.name, p.id, t.expires_at, t.created_at
		FROM tokens t JOIN projects p ON p.seq = t.project
		WHERE t.revoked_at IS NULL AND (t.expires_at, t.seq) > (?, ?) AND t.expires_at < ? AND p.deleted_at IS NULL
		ORDER BY t.expires_at, t.seq LIMIT ?`, after.expiresAt, after.seq, to, limit)
}
