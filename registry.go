// This room keeps the live view of tokens and their projects: what the next call
// of a token may do. It loads what it has not seen, and lets go of what is not in
// use; no state in it outlives a change by an admin. It never writes a row.
package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A projectState is what is known of a project at one version. It is immutable.
type projectState struct {
	seq        int64
	id, name   string
	active     bool
	policy     policy
	routing    routing
	upstreams  []*upstream // active ones, most preferred first
	version    int64
	loadFailed bool // a change of it could not be read: inactive until it is
}

type liveProject struct {
	state   atomic.Pointer[projectState]
	limiter limiter
}

var errUnknownToken = errors.New("unknown token")

// A registry answers "whose token is this, and what may it do now?" from
// memory, and loads from the store what it has not seen. An admin's change is
// put in before the admin gets the answer, so it holds from the next call on.
type registry struct {
	store  *store
	ledger *ledger
	sealer *sealer
	health *healthTracker
	// allowPrivate is the rule for base URLs that stored ones are held to.
	allowPrivate bool

	mu       sync.RWMutex
	byHash   map[[32]byte]*liveToken
	byID     map[string]*liveToken
	projects map[int64]*liveProject
	// changes counts what admins changed and what was evicted, so that a row read
	// before is not put in after it: a revoked token would rise again, and one
	// that was evicted would forget calls.
	changes    int64
	evictedSeq uint64 // what the ledger had been given when a token was last evicted
	// unknown remembers hashes that no token has, for a short while. It is
	// emptied when it is full: an attacker can fill it, but not grow it.
	unknownHashes map[[32]byte]int64
}

const (
	maxUnknownHashes = 4096
	unknownTTL       = 5 * time.Second
	evictAfter       = 10 * time.Minute
	maxLoadRetries   = 100 // each fails only if an admin changed something within it
)

func newRegistry(st *store, l *ledger, sl *sealer, health *healthTracker, allowPrivate bool) *registry {
	return &registry{store: st, ledger: l, sealer: sl, health: health, allowPrivate: allowPrivate,
		byHash: map[[32]byte]*liveToken{}, byID: map[string]*liveToken{},
		projects: map[int64]*liveProject{}, unknownHashes: map[[32]byte]int64{}}
}

// lookup returns the token with this hash and its state, whatever that state
// is; judging it is validity's work. A hash that no token has, or had until its
// overlap ended, is errUnknownToken. Any other error is the store's.
func (g *registry) lookup(ctx context.Context, hash [32]byte, now int64) (*liveToken, *tokenState, error) {
	g.mu.RLock()
	t := g.byHash[hash]
	until := g.unknownHashes[hash]
	g.mu.RUnlock()
	if t == nil && now < until {
		return nil, nil, errUnknownToken
	}
	if t == nil {
		var err error
		if t, err = g.loadToken(ctx, hash, now); err != nil {
			return nil, nil, err
		}
	}
	if t.project.state.Load().loadFailed {
		if err := g.reloadProject(ctx, t.project); err != nil {
			return nil, nil, err
		}
	}
	st := t.state.Load()
	if hash == st.hash || hash == st.oldHash && now < st.oldHashUntil {
		return t, st, nil
	}
	return nil, nil, errUnknownToken // its old self, after a rotation
}

// loadToken reads a token and its project and puts them in.
func (g *registry) loadToken(ctx context.Context, hash [32]byte, now int64) (*liveToken, error) {
	for range maxLoadRetries {
		g.mu.RLock()
		before, evicted := g.changes, g.evictedSeq
		g.mu.RUnlock()
		if err := g.ledger.awaitIfHealthy(ctx, evicted); err != nil { // a token's row must have all its calls when it is read
			return nil, fmt.Errorf("reading a token: %w", err)
		}
		row, err := g.store.tokenByHash(ctx, hash)
		if errors.Is(err, errNotFound) {
			g.mu.Lock()
			if len(g.unknownHashes) >= maxUnknownHashes {
				clear(g.unknownHashes)
			}
			g.unknownHashes[hash] = now + unknownTTL.Milliseconds()
			g.mu.Unlock()
			return nil, errUnknownToken
		}
		if err != nil {
			return nil, fmt.Errorf("reading a token: %w", err)
		}
		st, err := newTokenState(&row)
		if err != nil {
			return nil, err
		}
		project, err := g.loadProject(ctx, row.project)
		if err != nil {
			return nil, err
		}
		g.mu.Lock()
		if g.changes != before { // something was changed in between: read again
			g.mu.Unlock()
			continue
		}
		if p := g.projects[row.project]; p != nil {
			project = p
		}
		g.projects[row.project] = project
		t := g.byID[st.id]
		if t == nil {
			t = &liveToken{project: project, refusals: newThrottle(1, refusalLogInterval)}
			t.used.Store(row.requestCount)
			t.lastUsed.Store(max(row.createdAt, deref(row.lastUsedAt)))
			t.state.Store(st)
			g.byID[st.id] = t
		}
		g.byHash[hash] = t
		g.mu.Unlock()
		return t, nil
	}
	return nil, errors.New("reading a token: it kept changing")
}

// loadProject returns a project that is live, or a new one that is not yet put
// in: load does that if nothing has changed since.
func (g *registry) loadProject(ctx context.Context, seq int64) (*liveProject, error) {
	g.mu.RLock()
	p := g.projects[seq]
	g.mu.RUnlock()
	if p != nil {
		return p, nil
	}
	st, err := g.readProject(ctx, seq)
	if err != nil {
		return nil, err
	}
	p = &liveProject{}
	p.state.Store(st)
	return p, nil
}

// reloadProject reads a project anew whose last change could not be read.
func (g *registry) reloadProject(ctx context.Context, p *liveProject) error {
	for range maxLoadRetries {
		g.mu.RLock()
		before := g.changes
		g.mu.RUnlock()
		st, err := g.readProject(ctx, p.state.Load().seq)
		if err != nil {
			return err
		}
		g.mu.Lock()
		unchanged := g.changes == before
		if unchanged && p.state.Load().loadFailed {
			p.state.Store(st)
		}
		g.mu.Unlock()
		if unchanged {
			return nil
		}
	}
	return errors.New("reading a project: it kept changing")
}

func (g *registry) readProject(ctx context.Context, seq int64) (*projectState, error) {
	row, err := g.store.projectBySeq(ctx, seq)
	if err != nil {
		return nil, fmt.Errorf("reading project %d: %w", seq, err)
	}
	ups, err := g.store.usableUpstreams(ctx, seq)
	if err != nil {
		return nil, err
	}
	st := &projectState{seq: row.seq, id: row.id, name: row.name, active: row.active, version: row.version}
	if st.policy, err = parsePolicy([]byte(row.policy), true); err != nil {
		return nil, fmt.Errorf("policy of project %s: %w", row.id, err)
	}
	if st.routing, err = parseRouting([]byte(row.routing)); err != nil {
		return nil, fmt.Errorf("routing of project %s: %w", row.id, err)
	}
	for i := range ups {
		if !ups[i].active {
			continue
		}
		st.upstreams = append(st.upstreams, newUpstream(&ups[i], g.sealer, g.allowPrivate, g.health))
	}
	return st, nil
}

// tokenChanged puts in a token's row as an admin just left it.
func (g *registry) tokenChanged(row *tokenRow) error {
	st, err := newTokenState(row)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changes++
	if t := g.byID[row.id]; t != nil && t.state.Load().version < st.version {
		t.state.Store(st)
	}
	return nil
}

// projectChanged reads a project anew, and with tokens true each live token of
// it, all of which have just been revoked. What cannot be read is inactive, or
// revoked, until it can: an old state must never outlive a change.
func (g *registry) projectChanged(ctx context.Context, seq int64, tokens bool) error {
	st, err := g.readProject(ctx, seq)
	g.mu.Lock()
	g.changes++
	var mine []string
	for id, t := range g.byID {
		if tokens && t.project.state.Load().seq == seq {
			mine = append(mine, id)
		}
	}
	if p := g.projects[seq]; p != nil {
		switch was := p.state.Load(); {
		case err != nil:
			p.state.Store(&projectState{seq: seq, id: was.id, name: was.name, version: was.version, loadFailed: true})
		case was.version < st.version:
			p.state.Store(st)
		}
	}
	g.mu.Unlock()
	for _, id := range mine {
		row, e := g.store.tokenByID(ctx, id)
		if e == nil {
			e = g.tokenChanged(&row)
		}
		if e != nil {
			g.markRevoked(id)
			err = errors.Join(err, fmt.Errorf("reading token %s anew: %w", id, e))
		}
	}
	if err != nil {
		err = fmt.Errorf("the change is stored, but could not be read back: %w", err)
	}
	return err
}

// upstreamsChanged reads a project anew whose upstreams were changed, and all
// live ones that share some of them, or do from now on.
func (g *registry) upstreamsChanged(ctx context.Context, owner int64, sharers []int64) error {
	again := map[int64]bool{owner: true}
	for _, seq := range sharers {
		again[seq] = true
	}
	g.mu.RLock()
	for seq, p := range g.projects {
		again[seq] = again[seq] || slices.ContainsFunc(p.state.Load().upstreams, func(u *upstream) bool { return u.owner == owner })
	}
	g.mu.RUnlock()
	var errs []error
	for seq, yes := range again {
		if yes {
			errs = append(errs, g.projectChanged(ctx, seq, false))
		}
	}
	return errors.Join(errs...)
}

// markRevoked ends a token whose row says so but could not be read.
func (g *registry) markRevoked(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t := g.byID[id]; t != nil {
		st := *t.state.Load()
		st.revoked = true
		t.state.Store(&st)
	}
}

// evict drops tokens without a call for a while: memory follows the tokens in
// use, not those that exist. settled says that the ledger has just written all it
// was given: while it cannot, rows may lack calls for long.
func (g *registry) evict(now int64, settled bool) {
	if !settled {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	some := false
	for hash, t := range g.byHash {
		if t.lastUsed.Load() < now-evictAfter.Milliseconds() && t.tryEvict() {
			delete(g.byHash, hash)
			delete(g.byID, t.state.Load().id)
			some = true
		}
	}
	if some { // a call may have ended since the ledger was asked
		g.changes++
		g.evictedSeq = g.ledger.queuedSoFar()
	}
}

// liveToken returns a token that has been used of late, nil for any other.
func (g *registry) liveToken(id string) *liveToken {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.byID[id]
}

// liveProject returns a project one of whose tokens was used, nil for any other.
func (g *registry) liveProject(seq int64) *liveProject {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.projects[seq]
}

// size says how many tokens and projects are held.
func (g *registry) size() (tokens, projects int64) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return int64(len(g.byID)), int64(len(g.projects))
}
