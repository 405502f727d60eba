// This file holds the operations of administrators: creating, changing and deleting what they manage.
// An operation validates its typed input, stores the change together with its audit event, and puts
// it in force before it returns. It knows neither HTTP nor the JSON of a request.
//
// The handlers of /manage and the pages of /admin are both thin over it. A page:
//   - reads with getToken, getProject and so on, which return the view that its template shows;
//   - decodes its form into a tokenInput, upstreamInput and so on, the same that a JSON body gives;
//   - calls the operation with r.origin, who acts and when, and r.ifMatchVersion, the version that the
//     change is based on (0: whichever is stored);
//   - shows a *fieldError beside the field it names.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// operations is what administrators can do, with exactly what that needs.
type operations struct {
	store        *store
	sealer       *sealer // seals provider keys; nothing here opens them
	registry     *registry
	limits       *limitState
	health       *healthTracker
	running      *runningCalls
	prices       *atomic.Pointer[priceTable]
	contentKey   *contentKey
	cache        *responseCache
	notifier     *notifier
	keyTester    *keyTester
	openaiURL    string      // the base URL of an OpenAI upstream that names none
	allowPrivate bool        // base URLs may be private addresses and plain http
	fields       fieldTables // of the inputs
	self         replicaRow  // this process, as administrators see it
}

// createFirstKey creates the management key that the first start shows.
func (ops *operations) createFirstKey(ctx context.Context) (secret, error) {
	in := keyInput{name: given("first key"), role: given(string(roleAdmin))}
	_, value, err := ops.createManagementKey(ctx, systemOrigin(time.Now()), in)
	return value, err
}

// createFirstProject creates a project with one OpenAI key, and a token for it.
func (ops *operations) createFirstProject(ctx context.Context, name string, key secret) (secret, error) {
	origin := systemOrigin(time.Now())
	project, err := ops.createProject(ctx, origin, projectInput{name: given(name), key: given(key)})
	if err != nil {
		return nil, fmt.Errorf("OPENAI_API_KEY: %w", err)
	}
	_, value, err := ops.createToken(ctx, origin, tokenInput{projectID: given(project.id), name: given("first token")})
	return value, err
}

// createToken creates a token and returns its value, which is not stored.
func (ops *operations) createToken(ctx context.Context, origin auditOrigin, in tokenInput) (tokenRow, secret, error) {
	if !in.projectID.hasValue() {
		return tokenRow{}, nil, &fieldError{"project_id", "is required"}
	}
	now := time.UnixMilli(origin.at)
	t := tokenRow{
		projectID: in.projectID.value,
		name:      "unnamed",
		policy:    "{}",
		createdAt: origin.at,
		updatedAt: origin.at,
		expiresAt: new(now.Add(defaultTokenLifetime).UnixMilli()),
	}
	if err := in.apply(&ops.fields, &t, now); err != nil {
		return tokenRow{}, nil, err
	}
	value, err := ops.mintToken(ctx, origin, &t)
	return t, value, asProjectFieldError(err)
}

// mintToken gives t an id and a value and stores it.
func (ops *operations) mintToken(ctx context.Context, origin auditOrigin, t *tokenRow) (secret, error) {
	for range 5 { // the public part is short enough to be taken by chance
		value, public := mintCredential(tokenPrefix, "")
		hash := hashMinted(value)
		t.id, t.hash = "tok_"+public, hash
		err := ops.store.addToken(ctx, origin, t)
		if errors.Is(err, errTaken) {
			continue
		}
		return value, err
	}
	return nil, errors.New("no free token id was found")
}

// updateToken changes a token that is not revoked.
func (ops *operations) updateToken(
	ctx context.Context, origin auditOrigin, id string, version int64, in tokenInput,
) (tokenRow, error) {
	return ops.changeToken(ctx, origin, id, version, func(t *tokenRow) error {
		if t.revokedAt != nil {
			return errRevoked("token")
		}
		return in.apply(&ops.fields, t, time.UnixMilli(origin.at))
	})
}

// rotateToken gives a token a new value, which it returns. The id, limits and counts stay. The previous
// value works for the given overlap; the one before it stops working at once.
func (ops *operations) rotateToken(
	ctx context.Context, origin auditOrigin, id string, version int64, in rotateInput,
) (tokenRow, secret, error) {
	overlap := int64(defaultOverlapMinutes)
	if err := applyFields(&in, &overlap, ops.fields.rotate); err != nil {
		return tokenRow{}, nil, err
	}
	var value secret
	t, err := ops.changeToken(ctx, origin, id, version, func(t *tokenRow) error {
		if t.revokedAt != nil {
			return errRevoked("token")
		}
		value, _ = mintCredential(tokenPrefix, t.id[len("tok_"):])
		hash := hashMinted(value)
		t.oldHash, t.oldHashUntil = t.hash, new(origin.at+overlap*time.Minute.Milliseconds())
		t.hash = hash
		return nil
	})
	return t, value, err
}

// revokeToken ends a token permanently. Revoking it twice keeps the first time.
func (ops *operations) revokeToken(
	ctx context.Context, origin auditOrigin, id string, version int64,
) (tokenRow, error) {
	t, err := ops.changeToken(ctx, origin, id, version, func(t *tokenRow) error {
		if t.revokedAt == nil {
			t.revokedAt = &origin.at
		}
		return nil
	})
	if err == nil {
		ops.cache.purgeUnreachable(ctx, cacheFilter{project: t.project, token: t.seq})
	}
	return t, err
}

func (ops *operations) changeToken(
	ctx context.Context, origin auditOrigin, id string, version int64, change func(*tokenRow) error,
) (tokenRow, error) {
	t, err := ops.store.changeToken(ctx, origin, id, version, origin.at, change)
	if err != nil {
		return tokenRow{}, err
	}
	owner := leaseOwner{t.project, t.seq, t.version}
	return t, cmp.Or(ops.registry.tokenChanged(&t),
		ops.limits.policyChanged(ctx, owner, t.policy, t.maxRequests != nil))
}

// revokeProjectTokens revokes all tokens of a project and returns how many were valid.
func (ops *operations) revokeProjectTokens(ctx context.Context, origin auditOrigin, projectID string) (int64, error) {
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return 0, err
	}
	n, err := ops.store.revokeTokens(ctx, origin, p.id, origin.at)
	if err != nil {
		return 0, err
	}
	defer ops.cache.purgeUnreachable(ctx, cacheFilter{project: p.seq, token: anyToken})
	return n, ops.registry.projectChanged(ctx, p.seq)
}

// createManagementKey creates a management key and returns its value, which is not stored.
func (ops *operations) createManagementKey(
	ctx context.Context, origin auditOrigin, in keyInput,
) (managementKeyRow, secret, error) {
	in.name.set, in.role.set = true, true // both are required
	k := managementKeyRow{createdAt: origin.at, updatedAt: origin.at}
	if err := in.apply(&ops.fields, &k, time.UnixMilli(origin.at)); err != nil {
		return managementKeyRow{}, nil, err
	}
	value, public := mintCredential(manageKeyPrefix, "")
	hash := hashMinted(value)
	k.id, k.hash = "key_"+public, hash
	if err := ops.store.addManagementKey(ctx, origin, &k); err != nil {
		return managementKeyRow{}, nil, fmt.Errorf("storing a management key: %w", err)
	}
	return k, value, nil
}

// updateManagementKey changes a management key that is not revoked.
func (ops *operations) updateManagementKey(
	ctx context.Context, origin auditOrigin, id string, version int64, in keyInput,
) (managementKeyRow, error) {
	return ops.changeManagementKey(ctx, origin, id, version, func(k *managementKeyRow) error {
		if k.revokedAt != nil {
			return errRevoked("key")
		}
		return in.apply(&ops.fields, k, time.UnixMilli(origin.at))
	})
}

// revokeManagementKey ends a management key permanently. Revoking it twice keeps the first time.
func (ops *operations) revokeManagementKey(
	ctx context.Context, origin auditOrigin, id string, version int64,
) (managementKeyRow, error) {
	return ops.changeManagementKey(ctx, origin, id, version, func(k *managementKeyRow) error {
		if k.revokedAt == nil {
			k.revokedAt = &origin.at
		}
		return nil
	})
}

// changeManagementKey stores a change of a key. A key cannot change itself: an admin who takes away
// the rights of the only key would be locked out.
func (ops *operations) changeManagementKey(
	ctx context.Context, origin auditOrigin, id string, version int64, change func(*managementKeyRow) error,
) (managementKeyRow, error) {
	if id == origin.actorID {
		return managementKeyRow{}, &fieldError{"", "A key cannot change or revoke itself. Use another admin key."}
	}
	return ops.store.changeManagementKey(ctx, origin, id, version, origin.at, change)
}

// createProject creates a project with its upstreams: a first one if a provider key is given, and those of the input.
func (ops *operations) createProject(ctx context.Context, origin auditOrigin, in projectInput) (projectRow, error) {
	p, upstreams, err := ops.newProject(in, origin.at)
	if err == nil {
		err = ops.store.addProject(ctx, origin, p, upstreams...)
	}
	if err != nil {
		return projectRow{}, err
	}
	return *p, nil
}

// newProject makes the rows of a project and its upstreams, which are not stored yet.
func (ops *operations) newProject(in projectInput, at int64) (*projectRow, []*upstreamRow, error) {
	in.name.set = true // it is required
	p := &projectRow{id: newID("proj"), active: true, policy: "{}", routing: "{}",
		costMultiplier: multiplierOne, createdAt: at, updatedAt: at}
	err := applyFields(&in, p, ops.fields.project)
	switch {
	case in.key.hasValue() && in.openaiKey.hasValue():
		err = errors.Join(err, &fieldError{"api_key", "and openai_api_key cannot be combined"})
	case in.openaiKey.hasValue():
		in.key = in.openaiKey
	case !in.key.hasValue() && (in.provider.set || in.baseURL.set):
		err = errors.Join(err, &fieldError{"api_key", "is required with provider or base_url"})
	}
	var upstreams []*upstreamRow
	if in.key.hasValue() {
		first := upstreamInput{name: given("primary"), provider: in.provider, baseURL: in.baseURL, key: in.key}
		up, upstreamErr := ops.newUpstream(p, first, at)
		upstreams, err = append(upstreams, up), errors.Join(err, upstreamErr)
	}
	for i, other := range in.upstreams {
		up, upstreamErr := ops.newUpstream(p, other, at)
		upstreams = append(upstreams, up)
		err = errors.Join(err, qualifyFieldError(fmt.Sprintf("upstreams[%d]", i), upstreamErr))
	}
	return p, upstreams, err
}

func (ops *operations) updateProject(
	ctx context.Context, origin auditOrigin, id string, version int64, in projectInput,
) (projectRow, error) {
	p, err := ops.store.changeProject(ctx, origin, id, version, origin.at, func(p *projectRow) error {
		return applyFields(&in, p, ops.fields.project)
	})
	if err != nil {
		return projectRow{}, err
	}
	owner := leaseOwner{project: p.seq, version: p.version}
	return p, cmp.Or(ops.registry.projectChanged(ctx, p.seq),
		ops.limits.policyChanged(ctx, owner, p.policy, false))
}

// deleteProject deletes a project, revokes its tokens and wipes its provider keys.
func (ops *operations) deleteProject(ctx context.Context, origin auditOrigin, id string, version int64) error {
	p, err := ops.store.deleteProject(ctx, origin, id, version, origin.at)
	if err != nil {
		return err
	}
	defer ops.cache.purgeUnreachable(ctx, cacheFilter{project: p.seq})
	return errors.Join(ops.registry.projectChanged(ctx, p.seq), ops.registry.upstreamsChanged(ctx, p.seq, nil))
}

func (ops *operations) createUpstream(
	ctx context.Context, origin auditOrigin, projectID string, in upstreamInput,
) (upstreamRow, error) {
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return upstreamRow{}, err
	}
	u, err := ops.newUpstream(&p, in, origin.at)
	if err != nil {
		return upstreamRow{}, err
	}
	if err := ops.store.addUpstream(ctx, origin, u, origin.at); err != nil {
		return upstreamRow{}, err
	}
	return *u, ops.upstreamChanged(ctx, u)
}

// newUpstream makes the row of an upstream that is not stored yet.
func (ops *operations) newUpstream(p *projectRow, in upstreamInput, at int64) (*upstreamRow, error) {
	u := &upstreamRow{
		id:         newID("up"),
		project:    p.seq,
		projectID:  p.id,
		weight:     1,
		models:     "[]",
		rewrite:    "{}",
		settings:   "{}",
		sharedWith: "[]",
		active:     true,
		createdAt:  at,
		updatedAt:  at,
	}
	return u, in.apply(ops, u, true)
}

func (ops *operations) updateUpstream(
	ctx context.Context, origin auditOrigin, projectID, id string, version int64, in upstreamInput,
) (upstreamRow, error) {
	return ops.changeUpstream(ctx, origin, projectID, id, version, func(u *upstreamRow) (bool, error) {
		return false, in.apply(ops, u, false)
	})
}

// deleteUpstream takes an upstream out of use and wipes its key. The row stays: the ledger refers to it.
func (ops *operations) deleteUpstream(
	ctx context.Context, origin auditOrigin, projectID, id string, version int64,
) error {
	_, err := ops.changeUpstream(ctx, origin, projectID, id, version, func(u *upstreamRow) (bool, error) {
		u.active, u.sealedKey, u.keyHint = false, []byte{}, ""
		return true, nil
	})
	return err
}

func (ops *operations) changeUpstream(
	ctx context.Context, origin auditOrigin, projectID, id string, version int64,
	change func(*upstreamRow) (bool, error),
) (upstreamRow, error) {
	u, err := ops.store.changeUpstream(ctx, origin, projectID, id, version, origin.at, change)
	if err != nil {
		return upstreamRow{}, err
	}
	ops.health.reset(u.seq, origin.at)
	return u, ops.upstreamChanged(ctx, &u)
}

// upstreamChanged puts a changed upstream in force in every project that it serves.
func (ops *operations) upstreamChanged(ctx context.Context, u *upstreamRow) error {
	sharers, err := ops.store.sharedProjects(ctx, u.seq)
	return errors.Join(err, ops.registry.upstreamsChanged(ctx, u.project, sharers))
}

// setPrice sets the operator's own price of a model or pattern, and replaces an earlier one.
func (ops *operations) setPrice(ctx context.Context, origin auditOrigin, in priceInput) (priceRow, error) {
	p := priceRow{id: newID("price"), updatedAt: origin.at}
	if err := in.apply(&ops.fields, &p); err != nil {
		return priceRow{}, err
	}
	if err := ops.store.setPrice(ctx, origin, &p); err != nil {
		return priceRow{}, err
	}
	return p, ops.reloadPrices(ctx)
}

func (ops *operations) deletePrice(ctx context.Context, origin auditOrigin, id string) error {
	if err := ops.store.deletePrice(ctx, origin, id); err != nil {
		return err
	}
	return ops.reloadPrices(ctx)
}

func (ops *operations) reloadPrices(ctx context.Context) error {
	table, err := effectivePrices(ctx, ops.store)
	if err != nil {
		return fmt.Errorf("the price is stored, but not yet in force: %w", err)
	}
	ops.prices.Store(table)
	return nil
}

const actionEraseContent = "content.erase"

// eraseContent deletes all stored content of a project, cached answers included, and returns of how many calls. It
// deletes in small steps, so that calls can be recorded in between.
func (ops *operations) eraseContent(
	ctx context.Context, origin auditOrigin, projectID string,
) (erased int64, err error) {
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return 0, err
	}
	event := auditEvent{action: actionEraseContent, object: p.id}
	if err := ops.store.recordAuditEvent(ctx, origin, event); err != nil {
		return 0, fmt.Errorf("recording who erases content: %w", err)
	}
	if _, err := ops.cache.purge(ctx, cacheFilter{project: p.seq}); err != nil {
		return 0, err
	}
	for {
		n, err := ops.store.deleteProjectContents(ctx, p.seq, 100)
		if err != nil || n == 0 {
			return erased, err
		}
		erased += n
		time.Sleep(time.Millisecond)
	}
}

const actionEmptyCache = "cache.empty"
