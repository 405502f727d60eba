// Handlers of /manage for tokens and management keys. The value of either is in
// one answer only: the one to the request that made it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"time"
)

func (api *manageAPI) createFirstKey(ctx context.Context) (secret, error) {
	by := systemOrigin(time.Now())
	row := &managementKeyRow{name: "first key", role: string(roleAdmin), createdAt: by.at, updatedAt: by.at}
	value := mintKey(row)
	if err := api.store.addManagementKey(ctx, by, row); err != nil {
		return nil, fmt.Errorf("storing the first management key: %w", err)
	}
	return value, nil
}

// createFirstProject makes a project with one OpenAI key, and a token for it.
func (api *manageAPI) createFirstProject(ctx context.Context, name string, key secret) (secret, error) {
	now := time.Now()
	project, _, err := api.addOpenAIProject(ctx, name, "{}", key, now)
	if err != nil {
		return nil, fmt.Errorf("OPENAI_API_KEY: %w", err)
	}
	token := &tokenRow{projectID: project.id, name: "first token", policy: "{}", createdAt: now.UnixMilli(), updatedAt: now.UnixMilli(),
		expiresAt: new(now.Add(defaultTokenLifetime).UnixMilli())}
	value, err := api.mintToken(ctx, systemOrigin(now), token)
	if err != nil {
		return nil, fmt.Errorf("storing the token: %w", err)
	}
	return value, nil
}

type tokenView struct {
	ID                string          `json:"id"`
	ProjectID         string          `json:"project_id"`
	Name              string          `json:"name"`
	IsActive          bool            `json:"is_active"` // by itself; its project may be inactive
	ExpiresAt         *timestamp      `json:"expires_at"`
	IdleExpiryMinutes *int64          `json:"idle_expiry_minutes"`
	RevokedAt         *timestamp      `json:"revoked_at"`
	MaxRequests       *int64          `json:"max_requests"`
	RequestCount      int64           `json:"request_count"`
	Policy            json.RawMessage `json:"policy"`
	LastUsedAt        *timestamp      `json:"last_used_at"`
	OverlapUntil      *timestamp      `json:"overlap_until"` // until then the value before the last rotation works too
	Version           int64           `json:"version"`
	CreatedAt         timestamp       `json:"created_at"`
	UpdatedAt         timestamp       `json:"updated_at"`
	Limits            []limitView     `json:"limits,omitzero"` // how those of the policy stand; of one token that is read
	Token             string          `json:"token,omitempty"`
}

func (api *manageAPI) newTokenView(t *tokenRow, now time.Time) tokenView {
	ms := now.UnixMilli()
	t = api.limits.withLiveUsage(t, ms)
	v := tokenView{ID: t.id, ProjectID: t.projectID, Name: t.name, ExpiresAt: newTimestamp(t.expiresAt), RevokedAt: newTimestamp(t.revokedAt),
		MaxRequests: t.maxRequests, RequestCount: t.requestCount, Policy: json.RawMessage(t.policy), LastUsedAt: newTimestamp(t.lastUsedAt),
		Version: t.version, CreatedAt: timestamp(t.createdAt), UpdatedAt: timestamp(t.updatedAt)}
	if t.oldHashUntil != nil && *t.oldHashUntil > ms {
		v.OverlapUntil = newTimestamp(t.oldHashUntil)
	}
	if t.idleExpiry != nil {
		v.IdleExpiryMinutes = new(*t.idleExpiry / time.Minute.Milliseconds())
	}
	idle := t.idleExpiry != nil && max(t.createdAt, deref(t.lastUsedAt))+*t.idleExpiry <= ms
	v.IsActive = t.revokedAt == nil && (t.expiresAt == nil || *t.expiresAt > ms) && !idle
	return v
}

func (api *manageAPI) listTokens(r *manageRequest) (*manageResponse, error) {
	page, err := r.parseListQuery("project_id", "active", "name")
	if err != nil {
		return nil, err
	}
	q := tokenListQuery{order: "oldest", project: r.query.Get("project_id"), prefix: r.query.Get("name"),
		afterSeq: page.seq, afterName: page.name, limit: page.limit + 1, now: r.now.UnixMilli()}
	if q.prefix != "" {
		q.order = "name"
	}
	if q.active, err = r.boolParam("active"); err != nil {
		return nil, err
	}
	if q.project != "" {
		if _, err := api.store.projectByID(r.ctx, q.project); err != nil {
			return nil, asProjectFieldError(err)
		}
	}
	var rows []tokenRow
	if _, err := api.store.walkTokens(r.ctx, q, func(t *tokenRow) bool { rows = append(rows, *t); return true }); err != nil {
		return nil, err
	}
	return &manageResponse{body: newListPage(rows, page.limit,
		func(t *tokenRow) tokenView { return api.newTokenView(t, r.now) },
		func(t *tokenRow) string { return formatCursor(t.seq, t.name) })}, nil
}

func asProjectFieldError(err error) error {
	if errors.Is(err, errNotFound) {
		return &fieldError{"project_id", "names no project"}
	}
	return err
}

// A tokenInput is what an admin may say about a token.
type tokenInput struct {
	projectID, name          optional[string]
	minutes, hours, days     optional[int64]
	expiresAt                optional[string]
	idleMinutes, maxRequests optional[int64]
	policy                   optional[json.RawMessage]
}

func (in *tokenInput) fields() map[string]any {
	return map[string]any{"name": &in.name, "duration_minutes": &in.minutes, "duration_hours": &in.hours, "expires_in_days": &in.days,
		"expires_at": &in.expiresAt, "idle_expiry_minutes": &in.idleMinutes, "max_requests": &in.maxRequests, "policy": &in.policy}
}

func nullableTokenFields() []string {
	return []string{"expires_at", "idle_expiry_minutes", "max_requests", "policy"}
}

// maxLifetime bounds what an admin may ask for; "never" is expires_at null.
const maxLifetime = 100 * 365 * 24 * time.Hour

// expiry works out when the token expires: nil for never. ok is false when the
// input does not say.
func (in *tokenInput) expiry(now time.Time) (at *int64, ok bool, err error) {
	given := 0
	for _, l := range []struct {
		name string
		in   optional[int64]
		unit time.Duration
	}{{"duration_minutes", in.minutes, time.Minute}, {"duration_hours", in.hours, time.Hour}, {"expires_in_days", in.days, 24 * time.Hour}} {
		if !l.in.set {
			continue
		}
		given++
		if l.in.value < 1 || l.in.value > int64(maxLifetime/l.unit) {
			return nil, false, &fieldError{l.name, "must be a whole number from 1 to 100 years' worth"}
		}
		at = new(now.Add(time.Duration(l.in.value) * l.unit).UnixMilli())
	}
	if in.expiresAt.set {
		given++
		if at, err = parseFutureTime("expires_at", in.expiresAt, now); err != nil {
			return nil, false, err
		}
	}
	if given > 1 {
		return nil, false, &fieldError{"expires_at", "and duration_minutes, duration_hours, expires_in_days exclude each other"}
	}
	return at, given == 1, nil
}

// parseFutureTime reads an RFC 3339 time after now; null is nil: never.
func parseFutureTime(name string, in optional[string], now time.Time) (*int64, error) {
	if !in.hasValue() {
		return nil, nil
	}
	t, err := time.Parse(time.RFC3339, in.value)
	if err != nil {
		return nil, &fieldError{name, "must be a time such as 2027-01-31T00:00:00Z, or null for never"}
	}
	if !t.After(now) || t.Sub(now) > maxLifetime {
		return nil, &fieldError{name, "must be in the future, and within 100 years"}
	}
	return new(t.UnixMilli()), nil
}

func (in *tokenInput) apply(t *tokenRow, now time.Time) error {
	if in.name.set {
		if err := validateName(in.name.value); err != nil {
			return err
		}
		t.name = in.name.value
	}
	at, ok, err := in.expiry(now)
	if err != nil {
		return err
	}
	if ok {
		t.expiresAt = at
	}
	if in.idleMinutes.set {
		t.idleExpiry = nil
		if !in.idleMinutes.null {
			if in.idleMinutes.value < 1 || in.idleMinutes.value > int64(maxLifetime/time.Minute) {
				return &fieldError{"idle_expiry_minutes", "must be a whole number from 1 to 100 years' worth, or null"}
			}
			t.idleExpiry = new(in.idleMinutes.value * time.Minute.Milliseconds())
		}
	}
	if in.maxRequests.set {
		t.maxRequests = nil
		if !in.maxRequests.null {
			if in.maxRequests.value < 0 || in.maxRequests.value > math.MaxInt64/2 {
				return &fieldError{"max_requests", "must be 0 (none) or more, or null (unlimited)"}
			}
			t.maxRequests = new(in.maxRequests.value)
		}
	}
	if in.policy.set {
		p, err := parsePolicy(objectOrEmpty(in.policy), false)
		if err != nil {
			return err
		}
		t.policy = p.String()
	}
	return nil
}

// defaultTokenLifetime is for a token whose maker says nothing about its end.
const defaultTokenLifetime = 30 * 24 * time.Hour

func (api *manageAPI) createToken(r *manageRequest) (*manageResponse, error) {
	var in tokenInput
	fields := in.fields()
	fields["project_id"] = &in.projectID
	if err := decodeObject(r.body, fields, nullableTokenFields()...); err != nil {
		return nil, err
	}
	if !in.projectID.hasValue() {
		return nil, &fieldError{"project_id", "is needed"}
	}
	now := r.now.UnixMilli()
	t := &tokenRow{projectID: in.projectID.value, name: "unnamed", policy: "{}", createdAt: now, updatedAt: now,
		expiresAt: new(r.now.Add(defaultTokenLifetime).UnixMilli())}
	if err := in.apply(t, r.now); err != nil {
		return nil, err
	}
	value, err := api.mintToken(r.ctx, r.origin, t)
	if err != nil {
		return nil, asProjectFieldError(err)
	}
	v := api.newTokenView(t, r.now)
	v.Token = value()
	return &manageResponse{http.StatusCreated, t.version, v}, nil
}

// mintToken gives t a value and stores it.
func (api *manageAPI) mintToken(ctx context.Context, by auditOrigin, t *tokenRow) (secret, error) {
	for range 5 { // a public part that is taken is a matter of luck
		value, public := mintCredential(tokenPrefix, "")
		hash, _ := hashCredential(tokenPrefix, value())
		t.id, t.hash = "tok_"+public, hash[:]
		err := api.store.addToken(ctx, by, t)
		if errors.Is(err, errTaken) {
			continue
		}
		return value, err
	}
	return nil, errors.New("no free token id was found")
}

func (api *manageAPI) getToken(r *manageRequest) (*manageResponse, error) {
	t, err := api.store.tokenByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	v := api.newTokenView(&t, r.now)
	if v.Limits, err = api.limits.tokenLimits(r.ctx, &t, r.now.UnixMilli()); err != nil {
		return nil, err
	}
	return &manageResponse{0, t.version, v}, nil
}

func (api *manageAPI) patchToken(r *manageRequest) (*manageResponse, error) {
	var in tokenInput
	if err := decodeObject(r.body, in.fields(), nullableTokenFields()...); err != nil {
		return nil, err
	}
	return api.changeToken(r, func(t *tokenRow) error {
		if t.revokedAt != nil {
			return errRevoked("token")
		}
		return in.apply(t, r.now)
	})
}

func errRevoked(what string) error {
	return &fieldError{"", "The " + what + " is revoked, which is for good. Make a new one."}
}

// revokeToken ends a token for good. Revoking twice keeps the first time.
func (api *manageAPI) revokeToken(r *manageRequest) (*manageResponse, error) {
	return api.changeToken(r, func(t *tokenRow) error {
		if t.revokedAt == nil {
			t.revokedAt = new(r.now.UnixMilli())
		}
		return nil
	})
}

// changeToken stores a change and puts it in force before it returns.
func (api *manageAPI) changeToken(r *manageRequest, change func(*tokenRow) error) (*manageResponse, error) {
	t, err := api.store.changeToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, r.now.UnixMilli(), change)
	if err != nil {
		return nil, err
	}
	if err := api.registry.tokenChanged(&t); err != nil {
		return nil, err
	}
	return &manageResponse{0, t.version, api.newTokenView(&t, r.now)}, nil
}

const (
	defaultOverlapMinutes = 60
	maxOverlapMinutes     = 30 * 24 * 60
)

// rotateToken gives a token a new value. Its id, limits and counts stay; the
// value before works until the overlap ends, one before that no more.
func (api *manageAPI) rotateToken(r *manageRequest) (*manageResponse, error) {
	overlap := optional[int64]{value: defaultOverlapMinutes}
	if err := decodeObject(r.body, map[string]any{"overlap_minutes": &overlap}); err != nil {
		return nil, err
	}
	if overlap.value < 0 || overlap.value > maxOverlapMinutes {
		return nil, &fieldError{"overlap_minutes", "must be from 0 to 43200 (30 days)"}
	}
	var value secret
	rep, err := api.changeToken(r, func(t *tokenRow) error {
		if t.revokedAt != nil {
			return errRevoked("token")
		}
		value, _ = mintCredential(tokenPrefix, t.id[len("tok_"):])
		hash, _ := hashCredential(tokenPrefix, value())
		t.oldHash, t.oldHashUntil, t.hash = t.hash, new(r.now.UnixMilli()+overlap.value*time.Minute.Milliseconds()), hash[:]
		return nil
	})
	if err != nil {
		return nil, err
	}
	v := rep.body.(tokenView)
	v.Token = value()
	rep.body = v
	return rep, nil
}

type keyView struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Role      role       `json:"role"`
	IsActive  bool       `json:"is_active"`
	ExpiresAt *timestamp `json:"expires_at"`
	RevokedAt *timestamp `json:"revoked_at"`
	Version   int64      `json:"version"`
	CreatedAt timestamp  `json:"created_at"`
	UpdatedAt timestamp  `json:"updated_at"`
	Key       string     `json:"key,omitempty"`
}

func newKeyView(k *managementKeyRow, now time.Time) keyView {
	active := k.revokedAt == nil && (k.expiresAt == nil || *k.expiresAt > now.UnixMilli())
	return keyView{ID: k.id, Name: k.name, Role: role(k.role), IsActive: active, ExpiresAt: newTimestamp(k.expiresAt), RevokedAt: newTimestamp(k.revokedAt),
		Version: k.version, CreatedAt: timestamp(k.createdAt), UpdatedAt: timestamp(k.updatedAt)}
}

func (api *manageAPI) listKeys(r *manageRequest) (*manageResponse, error) {
	page, err := r.parseListQuery()
	if err != nil {
		return nil, err
	}
	rows, err := api.store.listManagementKeys(r.ctx, page.seq, page.limit+1)
	if err != nil {
		return nil, err
	}
	return &manageResponse{body: newListPage(rows, page.limit,
		func(k *managementKeyRow) keyView { return newKeyView(k, r.now) },
		func(k *managementKeyRow) string { return formatCursor(k.seq, "") })}, nil
}

// A keyInput is what an admin may say about a management key.
type keyInput struct{ name, role, expiresAt optional[string] }

func (in *keyInput) decode(body []byte) error {
	return decodeObject(body, map[string]any{"name": &in.name, "role": &in.role, "expires_at": &in.expiresAt}, "expires_at")
}

func (in *keyInput) apply(k *managementKeyRow, now time.Time) error {
	if in.name.set {
		if err := validateName(in.name.value); err != nil {
			return err
		}
		k.name = in.name.value
	}
	if in.role.set {
		if role(in.role.value).rank() == 0 {
			return &fieldError{"role", "must be viewer, operator or admin"}
		}
		k.role = in.role.value
	}
	if in.expiresAt.set {
		var err error
		if k.expiresAt, err = parseFutureTime("expires_at", in.expiresAt, now); err != nil {
			return err
		}
	}
	return nil
}

func (api *manageAPI) createKey(r *manageRequest) (*manageResponse, error) {
	var in keyInput
	if err := in.decode(r.body); err != nil {
		return nil, err
	}
	in.name.set, in.role.set = true, true // both are needed
	k := &managementKeyRow{createdAt: r.now.UnixMilli(), updatedAt: r.now.UnixMilli()}
	if err := in.apply(k, r.now); err != nil {
		return nil, err
	}
	value := mintKey(k)
	if err := api.store.addManagementKey(r.ctx, r.origin, k); err != nil {
		return nil, err
	}
	v := newKeyView(k, r.now)
	v.Key = value()
	return &manageResponse{http.StatusCreated, k.version, v}, nil
}

// mintKey gives k an id and a value, which it returns.
func mintKey(k *managementKeyRow) secret {
	value, public := mintCredential(manageKeyPrefix, "")
	hash, _ := hashCredential(manageKeyPrefix, value())
	k.id, k.hash = "key_"+public, hash[:]
	return value
}

func (api *manageAPI) getKey(r *manageRequest) (*manageResponse, error) {
	k, err := api.store.managementKeyByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	return &manageResponse{0, k.version, newKeyView(&k, r.now)}, nil
}

func (api *manageAPI) patchKey(r *manageRequest) (*manageResponse, error) {
	var in keyInput
	if err := in.decode(r.body); err != nil {
		return nil, err
	}
	return api.changeKey(r, func(k *managementKeyRow) error {
		if k.revokedAt != nil {
			return errRevoked("key")
		}
		return in.apply(k, r.now)
	})
}

func (api *manageAPI) revokeKey(r *manageRequest) (*manageResponse, error) {
	return api.changeKey(r, func(k *managementKeyRow) error {
		if k.revokedAt == nil {
			k.revokedAt = new(r.now.UnixMilli())
		}
		return nil
	})
}

// rekeyDatabase stores a change of a key. A key cannot take its own rights away:
// that would lock out who holds the only one.
func (api *manageAPI) changeKey(r *manageRequest, change func(*managementKeyRow) error) (*manageResponse, error) {
	if r.pathValue("id") == r.actor.id {
		return nil, &fieldError{"", "A key cannot change or revoke itself. Use another admin key."}
	}
	k, err := api.store.changeManagementKey(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, r.now.UnixMilli(), change)
	if err != nil {
		return nil, err
	}
	return &manageResponse{0, k.version, newKeyView(&k, r.now)}, nil
}
