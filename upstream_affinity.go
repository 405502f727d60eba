// This file finds out, by keyed hashes, which calls belong together. Calls that share a cached prompt go to one
// upstream: providers cache prompts by key. Calls that their clients send again are counted, and those that fail each
// time are found. Calls with the same key in the response cache are the same.
//
// How affinity works: each pair of a session and an upstream has a rank, which only a secret of the database and the
// upstream's weight decide (rendezvous hashing). A call goes to the upstream with the best rank of those that may have
// it now. So nothing is stored for a session, all replicas agree, the upstreams get shares of the sessions by their
// weights, and one that is added or removed moves its own share only.
//
// No I/O, and no state but the bounded tables of retryTracker. It decides among upstreams that may have the call, never
// which those are.
package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
)

// The values of a project's setting routing.affinity.
const (
	affinityBySession = "session"
	affinityOff       = "none"
)

// An affinitySource says what keeps a call together with others. The ledger stores its text.
type affinitySource string

const (
	affinityNone    affinitySource = ""        // nothing: the call is drawn by weight
	affinitySession affinitySource = "session" // the session that the client names
	affinityPrompt  affinitySource = "prompt"  // the beginning of the prompt
)

// An affinity names the calls that belong together. The zero value is that of a call that belongs to no others.
type affinity struct {
	source affinitySource
	key    uint64 // a keyed hash: clients can neither compute nor choose it
}

// A hashKey keys the hashes of what clients send. All replicas have the same.
type hashKey [sha256.Size]byte

// minCachedPrompt is the number of bytes of the prompt that decide, about 1,024 tokens. Providers cache no shorter
// ones, so calls with less have no affinity.
const minCachedPrompt = 4 << 10

// promptParts are the places in a JSON body of what a provider caches first: tools, then the system's prompt, then
// the messages. That is the order in which it reads them, whatever their order in the body.
type promptParts [3]struct{ from, to int }

// add records body[from:to] as the value of a field, if the field belongs to the prompt.
func (p *promptParts) add(field []byte, from, to int) {
	part := 0
	switch string(field) {
	case "tools", "functions":
	case "system", "instructions", "systemInstruction", "system_instruction":
		part = 1
	case "messages", "input", "contents", "prompt":
		part = 2
	default:
		return
	}
	p[part].from, p[part].to = from, to
}

// ofSession returns the affinity of the calls of a session.
func (k *hashKey) ofSession(session string) affinity {
	return affinity{affinitySession, k.sum('s', session, "")}
}

// sum returns the keyed hash of two texts for a purpose.
func (k *hashKey) sum(purpose byte, a, b string) uint64 {
	var space [sha256.Size + 1 + maxSessionLen + 1]byte // saves an allocation
	text := append(append(append(space[:0], k[:]...), purpose), a...)
	return firstBytes(sha256.Sum256(append(append(text, 0), b...)))
}

// ofPrompt returns the affinity of the calls for a model whose prompts begin alike. f was read from body.
func (k *hashKey) ofPrompt(body []byte, f *callFields) affinity {
	var space [sha256.Size + 1 + maxModelLen + 1 + minCachedPrompt]byte
	text := append(append(append(append(space[:0], k[:]...), 'p'), f.model...), 0)
	missing := minCachedPrompt
	for _, part := range f.prompt {
		n := min(part.to-part.from, missing)
		text = append(text, body[part.from:part.from+n]...)
		missing -= n
	}
	if missing > 0 {
		return affinity{}
	}
	return affinity{affinityPrompt, firstBytes(sha256.Sum256(text))}
}

func firstBytes(sum [sha256.Size]byte) (n uint64) {
	for _, b := range sum[:8] {
		n = n<<8 | uint64(b)
	}
	return n
}

// rank returns the rank of an upstream for calls with this affinity; the lowest is the best. Of a key, the ranks are
// exponentially distributed with the weights as rates, so that each upstream is best for a share of the keys that is
// its share of the weights.
func (a affinity) rank(u *upstream) float64 {
	const golden = 0x9e3779b97f4a7c15 // the steps of SplitMix64, which spreads neighboring numbers over all 64 bits
	x := a.key + uint64(u.seq)*golden
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	x ^= x >> 31
	uniform := (float64(x>>11) + 0.5) / (1 << 53) // above 0 and below 1
	return -math.Log(uniform) / float64(u.weight)
}

// maxSessionLen is the longest name of a session, in bytes.
const maxSessionLen = 256

// affinityOf returns the affinity of a call: that of its session ("": it names none), otherwise that of its prompt. f
// was read from body, which is nil if the call has no prompt that providers cache.
func (p *projectState) affinityOf(session string, body []byte, f *callFields) affinity {
	switch {
	case p.routing.Affinity == affinityOff || !p.sharesCalls():
		return affinity{}
	case session != "":
		return p.hashKey.ofSession(session)
	case body != nil:
		return p.hashKey.ofPrompt(body, f)
	}
	return affinity{}
}

// sharesCalls reports whether upstreams of the same priority share calls.
func (p *projectState) sharesCalls() bool {
	for i, u := range p.upstreams {
		if i > 0 && u.priority == p.upstreams[i-1].priority {
			return true
		}
	}
	return false
}

// pick returns the index of the upstream that gets a call. All in list may have it.
func (a affinity) pick(list []*upstream) int {
	switch {
	case len(list) == 1:
		return 0
	case a.source == affinityNone:
		return weightedPick(list)
	}
	best := a.best(list, func(*upstream) bool { return true })
	if list[best].health.running.Load() < minBusy {
		return best
	}
	l := loadOf(list)
	if !l.isFull(list[best]) {
		return best
	}
	// Not all are full, because not all have more than their share.
	if other := a.best(list, func(u *upstream) bool { return !l.isFull(u) }); other >= 0 {
		return other
	}
	return best
}

// best returns the index of the upstream with the best rank of those that pass, -1 if none does.
func (a affinity) best(list []*upstream, passes func(*upstream) bool) int {
	best, least := -1, math.Inf(1)
	for i, u := range list {
		if rank := a.rank(u); rank < least && passes(u) {
			best, least = i, rank
		}
	}
	return best
}

// explain completes the explanation of a route: which upstream of the group gets the calls with this affinity. group
// has the indexes in lines of the upstreams that share such calls.
func (a affinity) explain(lines []routeExplanation, group []int) {
	if a.source == affinityNone || len(group) < 2 {
		return
	}
	list := make([]*upstream, 0, len(group))
	for _, i := range group {
		list = append(list, lines[i].upstream)
	}
	picked := a.pick(list)
	for n, i := range group {
		lines[i].share, lines[i].reason = 0, "shares the sessions by weight, but this one goes elsewhere"
		if n == picked {
			lines[i].share, lines[i].reason = 1, "keeps the calls of this session together"
		}
	}
}

// A poolLoad is what the upstreams of a group have to do together.
type poolLoad struct{ running, weight int64 }

func loadOf(list []*upstream) (l poolLoad) {
	for _, u := range list {
		l.running += u.health.running.Load()
		l.weight += u.weight
	}
	return l
}

// minBusy is the number of running calls below which no upstream has too many.
const minBusy = 4

// excess returns how many running calls an upstream has, how many of them are more than its share, and its share.
func (l poolLoad) excess(u *upstream) (running int64, more, expected float64) {
	running = u.health.running.Load()
	expected = float64(l.running) * float64(u.weight) / float64(l.weight)
	return running, float64(running) - expected, expected
}

// isFull reports whether an upstream has so many running calls that sessions go elsewhere: more than one and a half
// times its share, and more than chance explains (by three standard deviations). An upstream that hangs must not
// collect calls until a timeout shows that it hangs, nor may one prompt that all clients share use one key alone.
func (l poolLoad) isFull(u *upstream) bool {
	running, more, expected := l.excess(u)
	return running >= minBusy && more > expected/2 && more*more > 9*expected
}

// weightedPick returns the index of an upstream drawn at random by weight. If that one has more running calls
// than weight and chance explain (by two standard deviations), it returns the least busy for its weight instead:
// a key that hangs must not collect calls until a timeout shows that it hangs.
func weightedPick(list []*upstream) int {
	var weights int64
	for _, u := range list {
		weights += u.weight
	}
	drawn := 0
	for at := rand.Int64N(weights); at >= list[drawn].weight; drawn++ {
		at -= list[drawn].weight
	}
	if list[drawn].health.running.Load() < minBusy {
		return drawn
	}
	busy, more, expected := loadOf(list).excess(list[drawn])
	if more <= 0 || more*more <= 4*expected {
		return drawn
	}
	best, least := drawn, busy
	for i, u := range list {
		if n := u.health.running.Load(); n*list[best].weight < least*u.weight {
			best, least = i, n
		}
	}
	return best
}

// Retries of clients.

const (
	maxClientRetry  = 1000
	stormFailures   = 10             // failures of one request that make a storm
	failureMemoryMS = 10 * 60 * 1000 // after this long without another failure, a request is forgotten
	stormMemoryMS   = hourMS         // the same for a storm, so that someone sees it
	maxFailures     = 2              // failing requests of one token that are counted
)

// A retryTracker finds out which calls clients have sent before, and which requests fail again and again. Its size is
// fixed, and it is in memory only. Of a body it has a hash, keyed for this process, and nothing else.
type retryTracker struct {
	metrics *metrics
	seed    maphash.Seed
	mu      sync.Mutex
	keys    [4096]int64 // hashes of the latest Idempotency-Keys, each where its lowest bits say
	failing [256]failureSet
}

// A failureSet has the failing requests of the tokens whose seq has the same lowest bits.
type failureSet struct {
	used    atomic.Int32 // entries in use: without any, a successful call takes no lock and hashes no body
	mu      sync.Mutex
	entries [4]failingRequest
}

// A failingRequest is a request that has failed and not succeeded since. The zero value is a free entry.
type failingRequest struct {
	requestIdentity
	failures           int64
	firstAt, lastAt    int64  // unix milliseconds
	model, code        string // of the last failure
	tokenID, tokenName string
	projectID, project string
}

// A requestIdentity tells the requests of clients apart.
type requestIdentity struct {
	token    int64 // its seq
	endpoint *endpoint
	size     int
	hash     uint64 // of the body, keyed
}

func newRetryTracker(m *metrics) *retryTracker {
	return &retryTracker{metrics: m, seed: maphash.MakeSeed()}
}

// A sentCall is what a retryTracker needs of a call.
type sentCall struct {
	token    *tokenState
	project  *projectState
	endpoint *endpoint // nil: it matched none
	body     []byte    // nil: it was not read, or is streamed
	header   http.Header
}

// record fills in the row of a call that has ended: whether its client had sent it before. It counts a failure.
func (t *retryTracker) record(c *sentCall, row *requestRow) {
	row.clientRetry = clientRetryOf(c.header)
	row.isClientRetry = row.clientRetry > 0
	if keys := c.header["Idempotency-Key"]; len(keys) == 1 && keys[0] != "" {
		row.idempotencyHash = int64(c.project.hashKey.sum('i', c.token.id, keys[0]))
		row.isClientRetry = t.isRepeated(row.idempotencyHash) || row.isClientRetry
	}
	if row.isClientRetry {
		t.metrics.countClientRetry(c.project.id)
	}
	if c.body != nil && c.endpoint != nil {
		t.recordResult(c, row)
	}
}

// clientRetryOf returns how often the client has sent the call before, as the SDKs of OpenAI and Anthropic count.
func clientRetryOf(h http.Header) int64 {
	values := h["X-Stainless-Retry-Count"]
	if len(values) == 0 {
		return 0
	}
	n, err := strconv.ParseUint(values[0], 10, 32)
	if err != nil {
		return 0
	}
	return int64(min(n, maxClientRetry))
}

// isRepeated reports whether an Idempotency-Key is one of the latest, and remembers it.
func (t *retryTracker) isRepeated(hash int64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	latest := &t.keys[uint64(hash)%uint64(len(t.keys))]
	repeated := *latest == hash
	*latest = hash
	return repeated
}

// recordResult counts a call that failed, and forgets the failures of one that did not.
func (t *retryTracker) recordResult(c *sentCall, row *requestRow) {
	set := &t.failing[uint64(c.token.seq)%uint64(len(t.failing))]
	failed := row.outcome != outcomeOK
	if !failed && set.used.Load() == 0 {
		return
	}
	id := requestIdentity{token: c.token.seq, endpoint: c.endpoint, size: len(c.body)}
	if !failed && !set.mayHave(id) {
		return
	}
	id.hash = maphash.Bytes(t.seed, c.body)
	now := row.started + row.totalUS/1000
	set.mu.Lock()
	defer set.mu.Unlock()
	e := set.find(id, now, failed)
	switch {
	case e == nil:
	case !failed:
		*e = failingRequest{}
	case e.failures == 0:
		*e = failingRequest{requestIdentity: id, firstAt: now, tokenID: c.token.id, tokenName: c.token.name,
			projectID: c.project.id, project: c.project.name}
		fallthrough
	default:
		e.failures++
		e.lastAt, e.model = now, row.model
		e.code = cmp.Or(row.errorCode, "status "+strconv.Itoa(row.status))
		if e.failures == stormFailures {
			t.metrics.retryStorms.Add(1)
		}
	}
	set.countUsed()
}

// mayHave reports whether a request of this size has failed.
func (s *failureSet) mayHave(id requestIdentity) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.entries[:], func(e failingRequest) bool {
		return e.token == id.token && e.endpoint == id.endpoint && e.size == id.size
	})
}

// find returns the entry of a request, nil if there is none. With add, it then returns a new one, unless all that it
// may replace are storms: a token has at most maxFailures entries. The caller holds the lock.
func (s *failureSet) find(id requestIdentity, now int64, add bool) *failingRequest {
	var free, own, other *failingRequest // own and other have the fewest failures
	owned := 0
	for i := range s.entries {
		e := &s.entries[i]
		if e.isOver(now) {
			*e = failingRequest{}
		}
		switch {
		case e.failures > 0 && e.requestIdentity == id:
			return e
		case e.failures == 0:
			free = e
		case e.token == id.token:
			if owned++; !e.isStorm() && (own == nil || e.failures < own.failures) {
				own = e
			}
		case !e.isStorm() && (other == nil || e.failures < other.failures):
			other = e
		}
	}
	entry := cmp.Or(free, other)
	if owned == maxFailures {
		entry = own
	}
	if !add || entry == nil {
		return nil
	}
	*entry = failingRequest{}
	return entry
}

// countUsed counts the entries in use. The caller holds the lock.
func (s *failureSet) countUsed() {
	used := int32(0)
	for i := range s.entries {
		if s.entries[i].failures > 0 {
			used++
		}
	}
	s.used.Store(used)
}

func (e *failingRequest) isStorm() bool { return e.failures >= stormFailures }

// isOver reports whether the request has not failed for so long that it is forgotten.
func (e *failingRequest) isOver(now int64) bool {
	age := max(now-e.lastAt, e.lastAt-now) // the clock may have been set back
	return age > stormMemoryMS || age > failureMemoryMS && !e.isStorm()
}

// storms returns the storms at now, those with the most failures first.
func (t *retryTracker) storms(now int64) (list []failingRequest) {
	for i := range t.failing {
		set := &t.failing[i]
		if set.used.Load() == 0 {
			continue
		}
		set.mu.Lock()
		for _, e := range set.entries {
			if e.isStorm() && !e.isOver(now) {
				list = append(list, e)
			}
		}
		set.mu.Unlock()
	}
	slices.SortFunc(list, func(a, b failingRequest) int {
		return cmp.Or(cmp.Compare(b.failures, a.failures), cmp.Compare(b.lastAt, a.lastAt))
	})
	return list
}

// The key of a cached answer.

// A cacheKey names an answer.
type cacheKey [sha256.Size]byte

// id is the row of a key in the table cache.
func (k *cacheKey) id() int64 { return int64(binary.BigEndian.Uint64(k[:8])) }

// String is the key as clients see it.
func (k *cacheKey) String() string { return hex.EncodeToString(k[:8]) }

// context binds a sealed answer to its project and its key.
func (k *cacheKey) context(project int64) string {
	return strconv.FormatInt(project, 10) + "|" + hex.EncodeToString(k[:])
}

// newCacheKey hashes everything that an answer depends on. Each part is preceded by its length, so that no other
// parts give the same bytes. salt is a secret of this database: without it, nobody who has the database can check
// whether some request was made.
func newCacheKey(salt []byte, parts []string, body []byte) (key cacheKey) {
	buf := make([]byte, 0, 512)
	buf = append(buf, salt...)
	buf = binary.AppendUvarint(buf, uint64(len(parts)))
	for _, p := range parts {
		buf = binary.AppendUvarint(buf, uint64(len(p)))
		buf = append(buf, p...)
	}
	h := sha256.New()
	h.Write(buf)
	h.Write(body) // the last part: its length follows from the rest
	h.Sum(key[:0])
	return key
}
