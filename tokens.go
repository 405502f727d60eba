// This room makes and reads the tokens that clients present, and keeps the live
// view of them: what the next call of a token may do. It never holds a token in
// clear for longer than the call that presents it, and never writes a row.
package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A token is
//
//	sk-llmp_<8 public>_<43 secret><6 checksum>
//
// in base62: the public part names it in logs, the secret has 256 bits, and the
// checksum (CRC-32 of all before it) lets a typing mistake or a scanner be told
// apart offline. A management key has the prefix llmpm_ and else the same form.
const (
	tokenPrefix = "sk-llmp_"
	keyPrefix   = "llmpm_"

	publicLen, secretLen, checksumLen = 8, 43, 6
)

const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// randomBase62 returns n characters, each one uniform.
func randomBase62(n int) string {
	out := make([]byte, 0, n)
	var buf [64]byte
	for len(out) < n {
		rand.Read(buf[:]) // never fails: crypto/rand ends the program instead
		for _, b := range buf {
			if b < 248 && len(out) < n { // 248 = 4 * 62: above it a byte would favour some characters
				out = append(out, base62[b%62])
			}
		}
	}
	return string(out)
}

// newID returns a random id such as proj_8yKp….
func newID(prefix string) string { return prefix + "_" + randomBase62(16) }

// mintCredential returns a new token or key with the given prefix and public
// part ("" for a new one), which it returns too.
func mintCredential(prefix, public string) (value secret, pub string) {
	if public == "" {
		public = randomBase62(publicLen)
	}
	text := prefix + public + "_" + randomBase62(secretLen)
	text += checksum(text)
	return newSecret(text), public
}

func checksum(text string) string {
	sum := crc32.ChecksumIEEE([]byte(text))
	var out [checksumLen]byte
	for i := range out {
		out[checksumLen-1-i] = base62[sum%62]
		sum /= 62
	}
	return string(out[:])
}

// hashCredential checks the form of a token or key without asking the store,
// and returns its SHA-256 and public part. A plain hash is right here: 2^256
// inputs cannot be tried, so salt and slowness would protect nothing.
func hashCredential(prefix, text string) (hash [32]byte, public string, ok bool) {
	if len(text) != len(prefix)+publicLen+1+secretLen+checksumLen || !strings.HasPrefix(text, prefix) {
		return hash, "", false
	}
	public = text[len(prefix) : len(prefix)+publicLen]
	if text[len(prefix)+publicLen] != '_' || checksum(text[:len(text)-checksumLen]) != text[len(text)-checksumLen:] {
		return hash, "", false
	}
	for i := range len(text) - len(prefix) {
		if c := text[len(prefix)+i]; i != publicLen && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return hash, "", false
		}
	}
	return sha256.Sum256([]byte(text)), public, true
}

// A tokenState is what is known of a token at one version. It is immutable.
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
}

// A liveToken is a token that has been used of late. Its state is swapped when
// the row changes; its counter is the one truth in this process: loaded once,
// then only added to, and the ledger adds the same to the row.
type liveToken struct {
	project  *liveProject
	state    atomic.Pointer[tokenState]
	used     atomic.Int64 // admitted calls over its life
	lastUsed atomic.Int64 // unix milliseconds
	refused  atomic.Int64 // when a refusal of it was last put on record
	running  atomic.Int64
}

// A projectState is what is known of a project at one version. It is immutable.
type projectState struct {
	seq       int64
	id, name  string
	active    bool
	policy    policy
	upstreams []*upstream // active ones, most preferred first
	version   int64
}

type liveProject struct {
	state atomic.Pointer[projectState]
}

var errUnknownToken = errors.New("unknown token")

// A registry answers "whose token is this, and what may it do now?" from
// memory, and loads from the store what it has not seen. An admin's change is
// put in before the admin gets the answer, so it holds from the next call on.
type registry struct {
	store  *store
	sealer *sealer
	// allowPrivate is the rule for base URLs that stored ones are held to.
	allowPrivate bool

	mu       sync.RWMutex
	byHash   map[[32]byte]*liveToken
	byID     map[string]*liveToken
	projects map[int64]*liveProject
	// changes counts what admins changed, so that a row read before a change
	// is not put in after it: a revoked token would rise again.
	changes int64
	// unknown remembers hashes that no token has, for a short while. It is
	// emptied when it is full: an attacker can fill it, but not grow it.
	unknown map[[32]byte]int64
}

const (
	maxUnknown       = 4096
	unknownFor       = 5 * time.Second
	evictAfter       = 10 * time.Minute
	loadAttempts     = 5
	refusalsRecorded = time.Second // at most one refused call on record a token in this time
)

func newRegistry(st *store, sl *sealer, allowPrivate bool) *registry {
	return &registry{store: st, sealer: sl, allowPrivate: allowPrivate,
		byHash: map[[32]byte]*liveToken{}, byID: map[string]*liveToken{},
		projects: map[int64]*liveProject{}, unknown: map[[32]byte]int64{}}
}

// lookup returns the token with this hash and its state, whatever that state
// is; judging it is validity's work. A hash that no token has, or had until its
// overlap ended, is errUnknownToken. Any other error is the store's.
func (g *registry) lookup(ctx context.Context, hash [32]byte, now int64) (*liveToken, *tokenState, error) {
	g.mu.RLock()
	t := g.byHash[hash]
	until := g.unknown[hash]
	g.mu.RUnlock()
	if t == nil && now < until {
		return nil, nil, errUnknownToken
	}
	if t == nil {
		var err error
		if t, err = g.load(ctx, hash, now); err != nil {
			return nil, nil, err
		}
	}
	st := t.state.Load()
	if hash == st.hash || hash == st.oldHash && now < st.oldHashUntil {
		return t, st, nil
	}
	return nil, nil, errUnknownToken // its old self, after a rotation
}

// load reads a token and its project and puts them in.
func (g *registry) load(ctx context.Context, hash [32]byte, now int64) (*liveToken, error) {
	for range loadAttempts {
		g.mu.RLock()
		before := g.changes
		g.mu.RUnlock()
		row, err := g.store.tokenByHash(ctx, hash)
		if errors.Is(err, errNotFound) {
			g.mu.Lock()
			if len(g.unknown) >= maxUnknown {
				clear(g.unknown)
			}
			g.unknown[hash] = now + unknownFor.Milliseconds()
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
		if g.changes != before { // an admin changed something in between: read again
			g.mu.Unlock()
			continue
		}
		t := g.byID[st.id]
		if t == nil {
			t = &liveToken{project: project}
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
	g.mu.Lock()
	defer g.mu.Unlock()
	if p = g.projects[seq]; p == nil {
		p = &liveProject{}
		p.state.Store(st)
		g.projects[seq] = p
	}
	return p, nil
}

func (g *registry) readProject(ctx context.Context, seq int64) (*projectState, error) {
	row, err := g.store.projectBySeq(ctx, seq)
	if err != nil {
		return nil, fmt.Errorf("reading project %d: %w", seq, err)
	}
	ups, err := g.store.upstreamsOf(ctx, seq)
	if err != nil {
		return nil, err
	}
	st := &projectState{seq: row.seq, id: row.id, name: row.name, active: row.active, version: row.version}
	if st.policy, err = parsePolicy([]byte(row.policy), true); err != nil {
		return nil, fmt.Errorf("policy of project %s: %w", row.id, err)
	}
	for i := range ups {
		if !ups[i].active {
			continue
		}
		st.upstreams = append(st.upstreams, newUpstream(&ups[i], g.sealer, g.allowPrivate))
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

// projectChanged reads a project anew, and with all true each live token of it.
// If that fails the project goes from memory, so that the next call reads it:
// an old state must never outlive a change.
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
		case err != nil: // not known any more: inactive until it can be read
			p.state.Store(&projectState{seq: seq, id: was.id, name: was.name, version: was.version})
			delete(g.projects, seq)
			g.forgetProject(p)
		case was.version < st.version:
			p.state.Store(st)
		}
	}
	g.mu.Unlock()
	for _, id := range mine {
		row, err := g.store.tokenByID(ctx, id)
		if err != nil {
			return fmt.Errorf("reading token %s anew: %w", id, err)
		}
		if err := g.tokenChanged(&row); err != nil {
			return err
		}
	}
	return err
}

// forgetProject drops p's tokens, so that they load anew with their project.
// g.mu is held. Their counters are safe: the caller's change is rare, and
// tokens with calls running are kept.
func (g *registry) forgetProject(p *liveProject) {
	for hash, t := range g.byHash {
		if t.project == p && t.running.Load() == 0 {
			delete(g.byHash, hash)
			delete(g.byID, t.state.Load().id)
		}
	}
}

// evict drops tokens without a call for a while: memory follows the tokens in
// use, not those that exist. settled says that the ledger has written all it
// was given, so the rows hold every count.
func (g *registry) evict(now int64, settled bool) {
	if !settled {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for hash, t := range g.byHash {
		if t.running.Load() == 0 && t.lastUsed.Load() < now-evictAfter.Milliseconds() {
			delete(g.byHash, hash)
			delete(g.byID, t.state.Load().id)
		}
	}
}

// size returns how many tokens are live.
func (g *registry) size() int {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return len(g.byID)
}

func deref(p *int64) int64 {
	if p == nil {
		return 0
	}
	return *p
}

func newTokenState(row *tokenRow) (*tokenState, error) {
	st := &tokenState{seq: row.seq, id: row.id, name: row.name, expiresAt: deref(row.expiresAt), idleExpiry: deref(row.idleExpiry),
		revoked: row.revokedAt != nil, maxRequests: -1, version: row.version}
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

// validity returns "" for a token that may be used now, or why not: expired,
// revoked, idle_expired.
func (t *liveToken) validity(st *tokenState, now int64) string {
	switch {
	case st.revoked:
		return "revoked"
	case st.expiresAt != 0 && now >= st.expiresAt:
		return "expired"
	case st.idleExpiry != 0 && t.running.Load() == 0 && now >= t.lastUsed.Load()+st.idleExpiry:
		return "idle_expired"
	}
	return ""
}

// reserve takes one call from the token's lifetime count. The count never
// passes the limit, under any parallelism: a call that finds it full takes
// nothing.
func (t *liveToken) reserve(limit int64) bool {
	for {
		n := t.used.Load()
		if limit >= 0 && n >= limit {
			return false
		}
		if t.used.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// refund gives a reserved call back: for one that was never forwarded.
func (t *liveToken) refund() { t.used.Add(-1) }
