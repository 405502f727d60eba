// Handlers of /manage for tokens and management keys. The value of either is in
// one answer only: the one to the request that made it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"time"
)

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

func (ops *operations) newTokenView(t *tokenRow, now time.Time) tokenView {
	ms := now.UnixMilli()
	t = ops.limits.withLiveUsage(t, ms)
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
		func(t *tokenRow) tokenView { return api.ops.newTokenView(t, r.now) },
		func(t *tokenRow) string { return formatCursor(t.seq, t.name) })}, nil
}

func asProjectFieldError(err error) error {
	if errors.Is(err, errNotFound) {
		return &fieldError{"project_id", "does not exist"}
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
	return map[string]any{"project_id": &in.projectID, "name": &in.name, "duration_minutes": &in.minutes, "duration_hours": &in.hours, "expires_in_days": &in.days,
		"expires_at": &in.expiresAt, "idle_expiry_minutes": &in.idleMinutes, "max_requests": &in.maxRequests, "policy": &in.policy}
}

func (in *tokenInput) decode(body []byte, isNew bool) error {
	fields := in.fields()
	if !isNew {
		delete(fields, "project_id")
	}
	return decodeObject(body, fields, "expires_at", "idle_expiry_minutes", "max_requests", "policy")
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
	if err := in.decode(r.body, true); err != nil {
		return nil, err
	}
	t, value, err := api.ops.createToken(r.ctx, r.origin, in)
	return api.tokenResponse(r, http.StatusCreated, &t, value, err)
}

// tokenResponse answers with a token, and with its value if that is new.
func (api *manageAPI) tokenResponse(r *manageRequest, status int, t *tokenRow, value secret, err error) (*manageResponse, error) {
	if err != nil {
		return nil, err
	}
	return &manageResponse{status, t.version, api.ops.newTokenValueView(t, value, r.now)}, nil
}

// newTokenValueView shows a token with its value, unless that is nil.
func (ops *operations) newTokenValueView(t *tokenRow, value secret, now time.Time) tokenView {
	v := ops.newTokenView(t, now)
	if value != nil {
		v.Token = value()
	}
	return v
}

func (api *manageAPI) getToken(r *manageRequest) (*manageResponse, error) {
	v, err := api.ops.getToken(r.ctx, r.pathValue("id"), r.now)
	return &manageResponse{0, v.Version, v}, err
}

// getToken returns a token and how its limits stand.
func (ops *operations) getToken(ctx context.Context, id string, now time.Time) (tokenView, error) {
	t, err := ops.store.tokenByID(ctx, id)
	if err != nil {
		return tokenView{}, err
	}
	v := ops.newTokenView(&t, now)
	v.Limits, err = ops.limits.tokenLimits(ctx, &t, now.UnixMilli())
	return v, err
}

func (api *manageAPI) patchToken(r *manageRequest) (*manageResponse, error) {
	var in tokenInput
	if err := in.decode(r.body, false); err != nil {
		return nil, err
	}
	t, err := api.ops.updateToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return api.tokenResponse(r, 0, &t, nil, err)
}

func errRevoked(what string) error {
	return &fieldError{"", "The " + what + " is revoked, which is permanent. Create a new one."}
}

func (api *manageAPI) revokeToken(r *manageRequest) (*manageResponse, error) {
	t, err := api.ops.revokeToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion)
	return api.tokenResponse(r, 0, &t, nil, err)
}

// A rotateInput says for how long the previous value of a rotated token works.
type rotateInput struct{ overlapMinutes optional[int64] }

func (in *rotateInput) decode(body []byte) error { return decodeObject(body, in.fields()) }

func (in *rotateInput) fields() map[string]any {
	return map[string]any{"overlap_minutes": &in.overlapMinutes}
}

const (
	defaultOverlapMinutes = 60
	maxOverlapMinutes     = 30 * 24 * 60
)

func (api *manageAPI) rotateToken(r *manageRequest) (*manageResponse, error) {
	var in rotateInput
	if err := in.decode(r.body); err != nil {
		return nil, err
	}
	t, value, err := api.ops.rotateToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return api.tokenResponse(r, 0, &t, value, err)
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
	l, err := api.ops.listManagementKeys(r.ctx, page, r.now)
	return &manageResponse{body: l}, err
}

func (ops *operations) listManagementKeys(ctx context.Context, query listQuery, now time.Time) (listPage[keyView], error) {
	rows, err := ops.store.listManagementKeys(ctx, query.seq, query.limit+1)
	return newListPage(rows, query.limit,
		func(k *managementKeyRow) keyView { return newKeyView(k, now) },
		func(k *managementKeyRow) string { return formatCursor(k.seq, "") }), err
}

// A keyInput is what an admin may say about a management key.
type keyInput struct{ name, role, expiresAt optional[string] }

func (in *keyInput) decode(body []byte) error { return decodeObject(body, in.fields(), "expires_at") }

func (in *keyInput) fields() map[string]any {
	return map[string]any{"name": &in.name, "role": &in.role, "expires_at": &in.expiresAt}
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
	k, value, err := api.ops.createManagementKey(r.ctx, r.origin, in)
	return keyResponse(r, http.StatusCreated, &k, value, err)
}

// keyResponse answers with a management key, and with its value if that is new.
func keyResponse(r *manageRequest, status int, k *managementKeyRow, value secret, err error) (*manageResponse, error) {
	if err != nil {
		return nil, err
	}
	return &manageResponse{status, k.version, newKeyValueView(k, value, r.now)}, nil
}

// newKeyValueView shows a management key with its value, unless that is nil.
func newKeyValueView(k *managementKeyRow, value secret, now time.Time) keyView {
	v := newKeyView(k, now)
	if value != nil {
		v.Key = value()
	}
	return v
}

func (api *manageAPI) getKey(r *manageRequest) (*manageResponse, error) {
	v, err := api.ops.getManagementKey(r.ctx, r.pathValue("id"), r.now)
	return &manageResponse{0, v.Version, v}, err
}

func (ops *operations) getManagementKey(ctx context.Context, id string, now time.Time) (keyView, error) {
	k, err := ops.store.managementKeyByID(ctx, id)
	return newKeyView(&k, now), err
}

func (api *manageAPI) patchKey(r *manageRequest) (*manageResponse, error) {
	var in keyInput
	if err := in.decode(r.body); err != nil {
		return nil, err
	}
	k, err := api.ops.updateManagementKey(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return keyResponse(r, 0, &k, nil, err)
}

func (api *manageAPI) revokeKey(r *manageRequest) (*manageResponse, error) {
	k, err := api.ops.revokeManagementKey(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion)
	return keyResponse(r, 0, &k, nil, err)
}
