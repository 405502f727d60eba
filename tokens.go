// This file makes and checks the credentials that clients present, and has the live state of a token. A credential
// in clear exists only during the call that creates or presents it. The file neither reads nor writes the store.
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
	case st.revoked:
		return "revoked"
	case st.expiresAt != 0 && now >= st.expiresAt:
		return "expired"
	case st.idleExpiry != 0 && t.running.Load() == 0 && now >= t.lastUsed.Load()+st.idleExpiry:
		return "idle_expired"
	}
	return ""
}

// reserve counts one call against the token's lifetime limit; a negative limit means none. If the limit is reached,
// reserve returns false and counts nothing. Parallel calls never exceed the limit.
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

// refund returns a reserved call that was never forwarded.
func (t *liveToken) refund() { t.used.Add(-1) }
