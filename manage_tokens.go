// This file has the handlers of /manage for tokens and management keys, and how these are shown. The value of
// a credential is only in the response to the request that created it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

type tokenView struct {
	ID                string          `json:"id"`
	ProjectID         string          `json:"project_id"`
	Name              string          `json:"name"`
	IsActive          bool            `json:"is_active"` // its project may be inactive nevertheless
	ExpiresAt         *timestamp      `json:"expires_at"`
	IdleExpiryMinutes *int64          `json:"idle_expiry_minutes"`
	RevokedAt         *timestamp      `json:"revoked_at"`
	MaxRequests       *int64          `json:"max_requests"`
	RequestCount      int64           `json:"request_count"`
	Policy            json.RawMessage `json:"policy"`
	LastUsedAt        *timestamp      `json:"last_used_at"`
	OverlapUntil      *timestamp      `json:"overlap_until"` // until then the previous value is valid too
	Version           int64           `json:"version"`
	CreatedAt         timestamp       `json:"created_at"`
	UpdatedAt         timestamp       `json:"updated_at"`
	Limits            []limitView     `json:"limits,omitzero"` // the state of the limits; only in a single token
	Token             string          `json:"token,omitempty"` // the value, only if it is new
}

func (v tokenView) etag() int64 { return v.Version }

func (ops *operations) newTokenView(t *tokenRow, now time.Time) tokenView {
	ms := now.UnixMilli()
	t = ops.limits.withLiveUsage(t, ms)
	v := tokenView{
		ID:           t.id,
		ProjectID:    t.projectID,
		Name:         t.name,
		ExpiresAt:    newTimestamp(t.expiresAt),
		RevokedAt:    newTimestamp(t.revokedAt),
		MaxRequests:  t.maxRequests,
		RequestCount: t.requestCount,
		Policy:       json.RawMessage(t.policy),
		LastUsedAt:   newTimestamp(t.lastUsedAt),
		Version:      t.version,
		CreatedAt:    timestamp(t.createdAt),
		UpdatedAt:    timestamp(t.updatedAt),
	}
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

func (api *manageAPI) listTokens(r *manageRequest) (any, error) {
	query, err := r.parseListQuery()
	if err != nil {
		return nil, err
	}
	q := tokenListQuery{order: "oldest", project: r.query.Get("project_id"), prefix: r.query.Get("name"),
		afterSeq: query.seq, afterName: query.name, limit: query.limit + 1, now: r.now.UnixMilli()}
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
	_, err = api.store.walkTokens(r.ctx, q, func(t *tokenRow) bool {
		rows = append(rows, *t)
		return true
	})
	return newListPage(rows, query.limit,
		func(t *tokenRow) tokenView { return api.ops.newTokenView(t, r.now) },
		func(t *tokenRow) string { return formatCursor(t.seq, t.name) }), err
}

func asProjectFieldError(err error) error {
	if errors.Is(err, errNotFound) {
		return &fieldError{"project_id", "does not exist"}
	}
	return err
}

// defaultTokenLifetime is the lifetime of a token if none is sent.
const defaultTokenLifetime = 30 * 24 * time.Hour

func (api *manageAPI) createToken(r *manageRequest, in tokenInput) (any, error) {
	t, value, err := api.ops.createToken(r.ctx, r.origin, in)
	return created{api.ops.newTokenValueView(&t, value, r.now)}, err
}

// newTokenValueView is newTokenView with the value, unless that is nil.
func (ops *operations) newTokenValueView(t *tokenRow, value secret, now time.Time) tokenView {
	v := ops.newTokenView(t, now)
	if value != nil {
		v.Token = value()
	}
	return v
}

func (api *manageAPI) getToken(r *manageRequest) (any, error) {
	return api.ops.getToken(r.ctx, r.pathValue("id"), r.now)
}

// getToken returns a token and the state of its limits.
func (ops *operations) getToken(ctx context.Context, id string, now time.Time) (tokenView, error) {
	t, err := ops.store.tokenByID(ctx, id)
	if err != nil {
		return tokenView{}, err
	}
	v := ops.newTokenView(&t, now)
	v.Limits, err = ops.limits.tokenLimits(ctx, &t, now.UnixMilli())
	return v, err
}

func (api *manageAPI) patchToken(r *manageRequest, in tokenInput) (any, error) {
	t, err := api.ops.updateToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return api.ops.newTokenView(&t, r.now), err
}

func errRevoked(what string) error {
	return &fieldError{"", "The " + what + " is revoked, which is permanent. Create a new one."}
}

func (api *manageAPI) revokeToken(r *manageRequest) (any, error) {
	t, err := api.ops.revokeToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion)
	return api.ops.newTokenView(&t, r.now), err
}

func (api *manageAPI) rotateToken(r *manageRequest, in rotateInput) (any, error) {
	t, value, err := api.ops.rotateToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return api.ops.newTokenValueView(&t, value, r.now), err
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
	Key       string     `json:"key,omitempty"` // the value, only if it is new
}

func (v keyView) etag() int64 { return v.Version }

func newKeyView(k *managementKeyRow, now time.Time) keyView {
	active := k.revokedAt == nil && (k.expiresAt == nil || *k.expiresAt > now.UnixMilli())
	return keyView{
		ID:        k.id,
		Name:      k.name,
		Role:      role(k.role),
		IsActive:  active,
		ExpiresAt: newTimestamp(k.expiresAt),
		RevokedAt: newTimestamp(k.revokedAt),
		Version:   k.version,
		CreatedAt: timestamp(k.createdAt),
		UpdatedAt: timestamp(k.updatedAt),
	}
}

func (api *manageAPI) listKeys(r *manageRequest) (any, error) {
	query, err := r.parseListQuery()
	if err != nil {
		return nil, err
	}
	return api.ops.listManagementKeys(r.ctx, query, r.now)
}

func (ops *operations) listManagementKeys(
	ctx context.Context, query listQuery, now time.Time,
) (listPage[keyView], error) {
	rows, err := ops.store.listManagementKeys(ctx, query.seq, query.limit+1)
	return newListPage(rows, query.limit,
		func(k *managementKeyRow) keyView { return newKeyView(k, now) },
		func(k *managementKeyRow) string { return formatCursor(k.seq, "") }), err
}

func (api *manageAPI) createKey(r *manageRequest, in keyInput) (any, error) {
	k, value, err := api.ops.createManagementKey(r.ctx, r.origin, in)
	return created{newKeyValueView(&k, value, r.now)}, err
}

// newKeyValueView is newKeyView with the value, unless that is nil.
func newKeyValueView(k *managementKeyRow, value secret, now time.Time) keyView {
	v := newKeyView(k, now)
	if value != nil {
		v.Key = value()
	}
	return v
}

func (api *manageAPI) getKey(r *manageRequest) (any, error) {
	return api.ops.getManagementKey(r.ctx, r.pathValue("id"), r.now)
}

func (ops *operations) getManagementKey(ctx context.Context, id string, now time.Time) (keyView, error) {
	k, err := ops.store.managementKeyByID(ctx, id)
	return newKeyView(&k, now), err
}

func (api *manageAPI) patchKey(r *manageRequest, in keyInput) (any, error) {
	k, err := api.ops.updateManagementKey(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return newKeyView(&k, r.now), err
}

func (api *manageAPI) revokeKey(r *manageRequest) (any, error) {
	k, err := api.ops.revokeManagementKey(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion)
	return newKeyView(&k, r.now), err
}
