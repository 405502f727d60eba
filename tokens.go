// This room makes and reads the tokens that clients present, and says what a
// stored one is worth. It never holds a token in clear for longer than the call
// that presents it, and never writes a row.
package main

import (
	"crypto/rand"
	"crypto/sha256"
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
	tokenPrefix     = "sk-llmp_"
	manageKeyPrefix = "llmpm_"

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
	sum := checksum([]byte(text))
	return newSecret(text + string(sum[:])), public
}

func checksum(text []byte) (out [checksumLen]byte) {
	sum := crc32.ChecksumIEEE(text)
	for i := range out {
		out[checksumLen-1-i] = base62[sum%62]
		sum /= 62
	}
	return out
}

// hashCredential checks the form of a token or key without asking the store,
// and returns its SHA-256 and public part. A plain hash is right here: 2^256
// inputs cannot be tried, so salt and slowness would protect nothing.
func hashCredential(prefix, text string) (hash [32]byte, public string, ok bool) {
	if len(text) != len(prefix)+publicLen+1+secretLen+checksumLen || !strings.HasPrefix(text, prefix) {
		return hash, "", false
	}
	public = text[len(prefix) : len(prefix)+publicLen]
	bytes, end := []byte(text), len(text)-checksumLen
	if text[len(prefix)+publicLen] != '_' || checksum(bytes[:end]) != [checksumLen]byte(bytes[end:]) {
		return hash, "", false
	}
	for i := range len(text) - len(prefix) {
		if c := text[len(prefix)+i]; i != publicLen && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return hash, "", false
		}
	}
	return sha256.Sum256(bytes), public, true
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

// A liveToken is a token that has been used of late. Its state is swapped when
// the row changes; its counter is the one truth in this process: loaded once,
// then only added to, and the ledger adds the same to the row.
type liveToken struct {
	project   *liveProject
	state     atomic.Pointer[tokenState]
	used      atomic.Int64 // admitted calls over its life
	lastUsed  atomic.Int64 // unix milliseconds
	refusals  *throttle    // which of its refused calls get a ledger row of their own
	running   atomic.Int64 // calls that hold it; far below 0 once it was evicted
	bodyBytes atomic.Int64 // bytes of request bodies held for it
	limits    limitScope   // guarded by its project's limiter

	mu            sync.Mutex
	trackedModels map[string]struct{} // names that have sums of their own
}

// maxTrackedModels bounds the names under which one token's calls are summed while
// it is live. Clients make up names; each would be rows that stay.
const maxTrackedModels = 100

// trackModel reports whether a model's name may have sums of its own.
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

// left is what running counts up from in a token that was evicted: never to 0.
const evictedRunning = -1 << 62

// acquire keeps the token from being evicted until release. It reports false when
// it was already: a second live token may then stand for the same row, and two
// counters would let one limit pass twice.
func (t *liveToken) acquire() bool { return t.running.Add(1) > 0 }

func (t *liveToken) release(at time.Time) {
	t.lastUsed.Store(at.UnixMilli())
	t.running.Add(-1)
}

// tryEvict reports whether the token may be dropped, and lets no call hold it any
// more if so.
func (t *liveToken) tryEvict() bool {
	return t.running.CompareAndSwap(0, evictedRunning) || t.running.Load() < 0
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
