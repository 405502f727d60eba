// This file makes and checks the credentials that clients present, and keeps the live tokens and their projects in
// memory: what the next call of a token may do. A credential in clear exists only during the call that creates or
// presents it. The registry loads a token at its first call and evicts it when it is idle. A change by an
// administrator is applied here before it is answered, so no call that starts afterwards sees the old state. The file
// never writes a row.
package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A token is
//
//	sk-llmp_<8 public>_<43 secret><6 checksum>
//
// in base62. The public part identifies it in logs, and the secret has 256 bits. The checksum is the CRC-32 of all
// characters before it: it recognizes typing mistakes and random text without the store. A management key has the
// same form with the prefix llmpm_.
const (
	tokenPrefix     = "sk-llmp_"
	manageKeyPrefix = "llmpm_"

	publicLen, secretLen, checksumLen = 8, 43, 6
)

const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// randomBase62 returns n uniformly distributed characters.
func randomBase62(n int) string {
	out := make([]byte, 0, n)
	var buf [64]byte
	for len(out) < n {
		rand.Read(buf[:]) // never fails: crypto/rand ends the program instead
		for _, b := range buf {
			if b < 248 && len(out) < n { // 248 = 4 * 62: larger bytes would favor some characters
				out = append(out, base62[b%62])
			}
		}
	}
	return string(out)
}

// newID returns a random id such as proj_8yKp….
func newID(prefix string) string { return prefix + "_" + randomBase62(16) }

// mintCredential returns a new token or key and its public part, which is random if public is "".
func mintCredential(prefix, public string) (value secret, pub string) {
	if public == "" {
		public = randomBase62(publicLen)
	}
	text := prefix + public + "_" + randomBase62(secretLen)
	sum := checksum([]byte(text))
	return newSecret(text + string(sum[:])), public
}

// hashMinted returns the SHA-256 of a credential that mintCredential made.
func hashMinted(value secret) []byte {
	hash := sha256.Sum256([]byte(value()))
	return hash[:]
}

func checksum(text []byte) (out [checksumLen]byte) {
	sum := crc32.ChecksumIEEE(text)
	for i := range out {
		out[checksumLen-1-i] = base62[sum%62]
		sum /= 62
	}
	return out
}

// hashCredential checks the form of a token or key, without the store, and returns its SHA-256. A plain hash is
// right here: nobody can try 2^256 inputs, so a salt or a slow hash would protect nothing.
func hashCredential(prefix, text string) (hash [32]byte, ok bool) {
	rest, ok := strings.CutPrefix(text, prefix)
	if !ok || len(rest) != publicLen+1+secretLen+checksumLen || rest[publicLen] != '_' ||
		!isAlphanumericOr(rest[:publicLen], "") || !isAlphanumericOr(rest[publicLen+1:], "") {
		return hash, false
	}
	bytes, end := []byte(text), len(text)-checksumLen
	if checksum(bytes[:end]) != [checksumLen]byte(bytes[end:]) {
		return hash, false
	}
	return sha256.Sum256(bytes), true
}

// A tokenState is a token's row at one version. It is immutable.
type tokenState struct {
	seq          int64
	id, name     string
	hash         [32]byte
	oldHash      [32]byte
	oldHashUntil int64 // 0: no old hash
	expiresAt    int64 // 0: never
	idleExpiry   int64 // 0: never
	revoked      bool
	maxRequests  int64 // -1: unlimited
	policy       policy
	version      int64
	loadFailed   bool // the row could not be read again, so it counts as revoked
}

func deref(p *int64) int64 {
	if p == nil {
		return 0
	}
	return *p
}

func newTokenState(row *tokenRow) (*tokenState, error) {
	st := &tokenState{
		seq: row.seq, id: row.id, name: row.name, version: row.version,
		expiresAt: deref(row.expiresAt), idleExpiry: deref(row.idleExpiry),
		revoked: row.revokedAt != nil, maxRequests: -1,
	}
	copy(st.hash[:], row.hash)
	if row.oldHash != nil {
		copy(st.oldHash[:], row.oldHash)
		st.oldHashUntil = deref(row.oldHashUntil)
	}
	if row.maxRequests != nil {
		st.maxRequests = *row.maxRequests
	}
	var err error
	if st.policy, err = parsePolicy([]byte(row.policy), false); err != nil {
		return nil, fmt.Errorf("policy of token %s: %w", row.id, err)
	}
	return st, nil
}

// A liveToken is a token that was used recently. Its state is replaced when its row changes. Its count of calls
// is authoritative in this process: it is loaded once and then only added to, and the ledger adds the same
// calls to the row.
type liveToken struct {
	project   *liveProject
	state     atomic.Pointer[tokenState]
	used      atomic.Int64 // admitted calls over its lifetime
	lastUsed  atomic.Int64 // unix milliseconds
	useReadAt atomic.Int64 // when it was last asked for at other replicas
	refusals  *throttle    // allows a refused call its own ledger row
	running   atomic.Int64 // calls between acquire and release; far below 0 once it is evicted
	bodyBytes atomic.Int64 // memory of its calls' request bodies
	limits    limitScope   // guarded by its project's limiter

	mu            sync.Mutex
	trackedModels map[string]struct{} // names that have their own sums
}

// maxTrackedModels bounds the model names under which a live token's calls are summed: clients can invent names,
// and each sum is a row that stays.
const maxTrackedModels = 100

// trackModel reports whether a model's name may have its own sums.
func (t *liveToken) trackModel(model string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.trackedModels[model]; ok {
		return true
	}
	if len(t.trackedModels) >= maxTrackedModels {
		return false
	}
	if t.trackedModels == nil {
		t.trackedModels = map[string]struct{}{}
	}
	t.trackedModels[model] = struct{}{}
	return true
}

// evictedRunning is the value of running in an evicted token: too low for calls to count it up to 0.
const evictedRunning = -1 << 62

// acquire protects the token from eviction until release. It returns false if the token was evicted already: the
// same row may have another live token then, and with two counters a limit could be used twice.
func (t *liveToken) acquire() bool { return t.running.Add(1) > 0 }

func (t *liveToken) release(at time.Time) {
	t.lastUsed.Store(at.UnixMilli())
	t.running.Add(-1)
}

// tryEvict reports whether the token may be dropped. If so, no call can acquire it any more.
func (t *liveToken) tryEvict() bool {
	return t.running.CompareAndSwap(0, evictedRunning) || t.running.Load() < 0
}

// validity returns "" if the token may be used now, and otherwise the reason: revoked, expired or idle_expired.
func (t *liveToken) validity(st *tokenState, now int64) string {
	switch {
	case st.revoked || st.seq < t.project.state.Load().tokensFrom:
		return "revoked"
	case st.expiresAt != 0 && now >= st.expiresAt:
		return "expired"
	case st.idleExpiry != 0 && t.running.Load() == 0 && now >= t.lastUsed.Load()+st.idleExpiry:
		return "idle_expired"
	}
	return ""
}

// A projectState is a project's row at one version. It is immutable.
type projectState struct {
	seq        int64
	id, name   string
	active     bool
	deleted    bool  // and so inactive, and its tokens are revoked, whatever their states say so far
	tokensFrom int64 // tokens with a lower seq are revoked, whatever their states say so far; it never decreases
	policy     policy
	routing    routing
	multiplier int64       // of costs, in ten-thousandths
	upstreams  []*upstream // the active ones, most preferred first
	// hashKey keys the hashes of sessions and of Idempotency-Keys. It is the same for all projects.
	hashKey    *hashKey
	version    int64
	loadFailed bool // a change could not be read; the project is inactive until it is
}

// A liveProject is the project of a live token. Its state is replaced when its row changes.
type liveProject struct {
	state   atomic.Pointer[projectState]
	limiter limiter
}

var errUnknownToken = errors.New("unknown token")

// A registry finds the token of a hash, its project and their state.
type registry struct {
	store        *store
	ledger       *ledger
	sealer       *sealer
	health       *healthTracker
	allowPrivate bool // stored base URLs may point into private networks

	mu       sync.RWMutex
	byHash   map[[32]byte]*liveToken
	byID     map[string]*liveToken
	projects map[int64]*liveProject
	// changes counts administrators' changes and evictions. A row that was read before one must not be added
	// after it: a revoked token would become valid again, and an evicted one would lose calls.
	changes    int64
	evictedSeq uint64 // the ledger's position at the last eviction
	// unknownHashes has hashes that belong to no token, with the time until which this is not checked again.
	// It is emptied when it is full: an attacker can fill it, but not make it grow.
	unknownHashes map[[32]byte]int64
}

const (
	maxUnknownHashes = 4096
	unknownTTL       = 5 * time.Second
	evictAfter       = 10 * time.Minute
	maxLoadRetries   = 100 // an attempt fails only if there is a change or an eviction during it
)

func newRegistry(st *store, l *ledger, sl *sealer, health *healthTracker, allowPrivate bool) *registry {
	return &registry{store: st, ledger: l, sealer: sl, health: health, allowPrivate: allowPrivate,
		byHash: map[[32]byte]*liveToken{}, byID: map[string]*liveToken{},
		projects: map[int64]*liveProject{}, unknownHashes: map[[32]byte]int64{}}
}

// lookup returns the token with this hash and its state. The token need not be valid: see validity. For a
// hash that no token has, or that was replaced and whose overlap ended, it returns errUnknownToken. Any other
// error comes from the store.
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
	if g.store.backend != nil && t.validity(st, now) == "idle_expired" {
		g.readLastUse(ctx, t, st.id, now)
	}
	if hash == st.hash || hash == st.oldHash && now < st.oldHashUntil {
		return t, st, nil
	}
	return nil, nil, errUnknownToken // the token has another hash since its rotation
}

// readLastUse reads when a token was last used at any replica, at most once a second.
func (g *registry) readLastUse(ctx context.Context, t *liveToken, id string, now int64) {
	if at := t.useReadAt.Load(); now-at < 1000 || !t.useReadAt.CompareAndSwap(at, now) {
		return
	}
	if row, err := g.store.boundTokenByID(ctx, id); err == nil {
		t.lastUsed.Store(max(t.lastUsed.Load(), deref(row.lastUsedAt)))
	}
}

// loadToken reads a token and its project and adds them.
func (g *registry) loadToken(ctx context.Context, hash [32]byte, now int64) (*liveToken, error) {
	for range maxLoadRetries {
		g.mu.RLock()
		before, evicted := g.changes, g.evictedSeq
		g.mu.RUnlock()
		// The row must include all calls of the token when it is read.
		if err := g.ledger.awaitIfHealthy(ctx, evicted); err != nil {
			return nil, fmt.Errorf("reading a token: %w", err)
		}
		row, err := g.store.tokenByHash(ctx, hash)
		if errors.Is(err, errNotFound) {
			g.rememberUnknown(hash, now)
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
		if errors.Is(err, errNotFound) { // a foreign row
			g.rememberUnknown(hash, now)
			return nil, errUnknownToken
		}
		if err != nil {
			return nil, err
		}
		if t := g.addToken(&row, hash, st, project, before); t != nil {
			return t, nil
		}
	}
	return nil, errors.New("reading a token: it kept changing")
}

// addToken adds a token that was read when changes had the value before, or returns nil if something changed
// since.
func (g *registry) addToken(row *tokenRow, hash [32]byte, st *tokenState, project *liveProject, before int64,
) *liveToken {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.changes != before {
		return nil
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
	return t
}

func (g *registry) rememberUnknown(hash [32]byte, now int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.unknownHashes) >= maxUnknownHashes {
		clear(g.unknownHashes)
	}
	g.unknownHashes[hash] = now + unknownTTL.Milliseconds()
}

// loadProject returns a live project, or a new one for addToken to add.
func (g *registry) loadProject(ctx context.Context, seq int64) (*liveProject, error) {
	if p := g.liveProject(seq); p != nil {
		return p, nil
	}
	st, err := g.readProject(ctx, seq)
	if err != nil {
		return nil, err
	}
	p := &liveProject{}
	p.state.Store(st)
	return p, nil
}

// reloadProject reads a project whose last change could not be read.
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
		if old := p.state.Load(); unchanged && old.loadFailed {
			st.tokensFrom = max(st.tokensFrom, old.tokensFrom)
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
	st := &projectState{seq: row.seq, id: row.id, name: row.name, active: row.active, deleted: row.deletedAt != nil,
		version: row.version, multiplier: row.costMultiplier, hashKey: (*hashKey)(&g.sealer.hashKey)}
	if st.tokensFrom, err = g.store.firstUnrevokedToken(ctx, seq); err != nil {
		return nil, err
	}
	if st.policy, err = parsePolicy([]byte(row.policy), true); err != nil {
		return nil, fmt.Errorf("policy of project %s: %w", row.id, err)
	}
	if st.routing, err = parseRouting([]byte(row.routing)); err != nil {
		return nil, fmt.Errorf("routing of project %s: %w", row.id, err)
	}
	for i := range ups {
		if ups[i].active {
			st.upstreams = append(st.upstreams, g.upstream(&ups[i]))
		}
	}
	return st, nil
}

// upstream returns a stored upstream, ready for use.
func (g *registry) upstream(row *upstreamRow) *upstream {
	return newUpstream(row, g.sealer, g.allowPrivate, g.health)
}

// tokenChanged applies a token's row after an administrator's change.
func (g *registry) tokenChanged(row *tokenRow) error {
	st, err := newTokenState(row)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changes++
	if t := g.byID[row.id]; t != nil {
		if old := t.state.Load(); old.version < st.version || old.loadFailed && old.version == st.version {
			t.state.Store(st)
		}
	}
	return nil
}

// projectChanged reads a project again after its row changed, or all its tokens were revoked: its new state refuses
// these and ends their calls, however many there are. A project that cannot be read is inactive until it can be: an old
// state must never outlive a change.
func (g *registry) projectChanged(ctx context.Context, seq int64) error {
	st, err := g.readProject(ctx, seq)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changes++
	if p := g.projects[seq]; p != nil {
		old := p.state.Load()
		switch {
		case err != nil:
			st = &projectState{seq: seq, id: old.id, name: old.name, version: old.version, loadFailed: true,
				hashKey: old.hashKey}
		case old.version >= st.version: // it was read before the newer one, but perhaps after more tokens were revoked
			tokensFrom := st.tokensFrom
			st = new(*old)
			st.tokensFrom = tokensFrom
		}
		st.tokensFrom = max(st.tokensFrom, old.tokensFrom)
		p.state.Store(st)
	}
	if err != nil {
		err = fmt.Errorf("the change is stored, but could not be read back: %w", err)
	}
	return err
}

// upstreamsChanged reads a project again after its upstreams changed, the live projects that used these so far, and
// sharers, the projects that may use them from now on.
func (g *registry) upstreamsChanged(ctx context.Context, owner int64, sharers []int64) error {
	affected := map[int64]bool{owner: true}
	for _, seq := range sharers {
		affected[seq] = true
	}
	g.mu.RLock()
	for seq, p := range g.projects {
		if slices.ContainsFunc(p.state.Load().upstreams, func(u *upstream) bool { return u.owner == owner }) {
			affected[seq] = true
		}
	}
	g.mu.RUnlock()
	var errs []error
	for seq := range affected {
		errs = append(errs, g.projectChanged(ctx, seq))
	}
	return errors.Join(errs...)
}

// markRevoked revokes a live token whose row could not be read, until it can be.
func (g *registry) markRevoked(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t := g.byID[id]; t != nil {
		st := *t.state.Load()
		st.revoked, st.loadFailed = true, true
		t.state.Store(&st)
	}
}

// evict drops tokens that have been idle for evictAfter: memory depends on the tokens in use, not on those
// that exist. settled says that the ledger has just written everything it was given. Otherwise rows may lack
// calls, and nothing is evicted.
func (g *registry) evict(now int64, settled bool) {
	if !settled {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	evicted := false
	for hash, t := range g.byHash {
		if t.lastUsed.Load() < now-evictAfter.Milliseconds() && t.tryEvict() {
			delete(g.byHash, hash)
			delete(g.byID, t.state.Load().id)
			evicted = true
		}
	}
	if evicted { // calls may have ended since the ledger was settled
		g.changes++
		g.evictedSeq = g.ledger.queuedSoFar()
	}
}

// liveToken returns a token that is in memory, or nil.
func (g *registry) liveToken(id string) *liveToken {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.byID[id]
}

// liveTokenOf returns the token with this seq if it is in memory, or nil. It looks at all of them.
func (g *registry) liveTokenOf(seq int64) *liveToken {
	g.mu.RLock()
	defer g.mu.RUnlock()
	for _, t := range g.byID {
		if t.state.Load().seq == seq {
			return t
		}
	}
	return nil
}

// liveProject returns a project that is in memory, or nil.
func (g *registry) liveProject(seq int64) *liveProject {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.projects[seq]
}

// liveProjects returns the projects that are in memory.
func (g *registry) liveProjects() []*liveProject {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.Collect(maps.Values(g.projects))
}

// size returns the number of tokens and projects in memory.
func (g *registry) size() (tokens, projects int64) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return int64(len(g.byID)), int64(len(g.projects))
}
