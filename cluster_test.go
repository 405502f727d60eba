//go:build postgres

// These tests run several replicas on one PostgreSQL database, in one process.
package main

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// everywhere is how long a change may take to hold at all replicas.
const everywhere = time.Second

// waitEverywhere waits until ok holds at each of the replicas. It must hold whenever it is asked for later than a
// change may take; how long the question itself takes depends on what else the machine does.
func waitEverywhere(t *testing.T, what string, replicas []*testProxy, ok func(p *testProxy) bool) {
	t.Helper()
	elapsed := stopwatch(t)
	for i, p := range replicas {
		var late time.Duration
		waitFor(t, what, func() bool {
			asked := elapsed()
			if ok(p) {
				return true
			}
			if asked > everywhere {
				late = asked
			}
			return false
		})
		if late > 0 {
			t.Errorf("%s: replica %d did not have it after %s", what, i+1, late)
		}
	}
}

// TestClusterStarts: replicas answer calls with one database, each has a slot of its own, and exactly one leads.
func TestClusterStarts(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	slots := map[int64]bool{}
	for _, p := range all {
		if res := p.chat(); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		slots[p.instance.store.backend.slot()] = true
	}
	if len(slots) != len(all) {
		t.Errorf("slots: %v", slots)
	}
	waitFor(t, "one leader", func() bool { return countLeaders(all) == 1 })
	all[0].execSQL(`UPDATE schema_version SET version = version + 1`) // as a newer version does
	for _, p := range all {
		if res := p.chat(); res.status != 200 {
			t.Errorf("after the migration of a newer version: %d %s", res.status, res.body)
		}
	}
	env := maps.Clone(all[0].env)
	env["DATA_DIR"] = t.TempDir()
	if _, err := runProgram(t, env, "serve"); err == nil || !strings.Contains(err.Error(), "newer llm-proxy") {
		t.Errorf("a start after the migration of a newer version: %v", err)
	}
	if err := all[0].stop(); err != nil { // it leads
		t.Fatal(err)
	}
	elapsed := stopwatch(t)
	waitFor(t, "another leader", func() bool { return countLeaders(all[1:]) == 1 })
	if took := elapsed(); took > 5*time.Second {
		t.Errorf("the leader was replaced after %s", took)
	}
}

func countLeaders(all []*testProxy) (n int) {
	for _, p := range all {
		if p.instance.store.isLeader() {
			n++
		}
	}
	return n
}

// TestClusterChanges: what an administrator changes at one replica holds at all of them within a second.
func TestClusterChanges(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	a, others := all[0], all[1:]
	status := func(p *testProxy, token string, want int) bool { return p.chatAs(token).status == want }

	// A token that was tried before it existed.
	value, public := mintCredential(tokenPrefix, "")
	for _, p := range all {
		if !status(p, value(), 401) {
			t.Error("an unknown token was admitted")
		}
	}
	now := time.Now().UnixMilli()
	if err := a.instance.store.addToken(t.Context(), systemOrigin(time.Now()), &tokenRow{id: "tok_" + public,
		projectID: a.project, name: "late", policy: "{}", hash: hashMinted(value), createdAt: now,
		updatedAt: now}); err != nil {
		t.Fatal(err)
	}
	waitEverywhere(t, "a new token", all, func(p *testProxy) bool { return status(p, value(), 200) })

	id, token := a.newToken(`"name":"changed"`)
	for _, p := range all {
		if !status(p, token, 200) {
			t.Fatal("a token was refused")
		}
	}
	a.manage("PATCH", "/manage/tokens/"+id, `{"policy":{"models":["other-*"]}}`, 200, nil)
	waitEverywhere(t, "a changed policy", others, func(p *testProxy) bool { return status(p, token, 403) })
	a.manage("PATCH", "/manage/tokens/"+id, `{"policy":{}}`, 200, nil)
	waitEverywhere(t, "the policy again", others, func(p *testProxy) bool { return status(p, token, 200) })
	var rotated struct{ Token string }
	a.manage("POST", "/manage/tokens/"+id+"/rotate", `{"overlap_minutes":0}`, 200, &rotated)
	waitEverywhere(t, "a rotated token", others, func(p *testProxy) bool { return status(p, token, 401) })
	for _, p := range all {
		p.secrets = append(p.secrets, rotated.Token)
		if !status(p, rotated.Token, 200) {
			t.Error("the new value of a token was refused")
		}
	}

	a.changeProject(`"is_active":false`)
	waitEverywhere(t, "a deactivated project", others, func(p *testProxy) bool { return status(p, p.token, 403) })
	a.changeProject(`"is_active":true`)
	waitEverywhere(t, "the project again", others, func(p *testProxy) bool { return status(p, p.token, 200) })
	a.changeUpstream(a.upstream, `"api_key":"sk-provider-other-0123456789abcdefghijklmnop"`)
	waitEverywhere(t, "a rotated provider key", others, func(p *testProxy) bool {
		return status(p, p.token, 200) && strings.Contains(a.provider.lastRequest(t).head, "sk-provider-other")
	})
	a.manage("POST", "/manage/prices", `{"match":"gpt-4o-mini*","input":1000,"output":1000}`, 201, nil)
	waitEverywhere(t, "a price", others, func(p *testProxy) bool {
		return status(p, p.token, 200) && *p.lastCall().Cost == 0.012
	})
	browserOfA := a.signIn(a.adminKey)
	for _, p := range others {
		if b := (&browser{p: p, cookie: browserOfA.cookie}); !b.isSignedIn() {
			t.Error("a session of one replica is none at another")
		}
	}
	a.manage("POST", "/manage/projects/"+a.project+"/tokens/revoke", "", 200, nil)
	waitEverywhere(t, "all tokens revoked", others, func(p *testProxy) bool { return status(p, p.token, 401) })
}

// TestClusterSharesHealth: a key that its provider refuses at one replica, or that works again there, is known to all.
// An emptied cache is empty at all replicas.
func TestClusterSharesHealth(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	a, others := all[0], all[1:]
	a.changeProject(`"policy":{"cache":{"ttl_seconds":3600}}`)
	hits := func(p *testProxy) bool {
		return strings.HasPrefix(p.cachedChat(p.token, `"user":"cached"`).header.Get("Cache-Status"), "llm-proxy; hit")
	}
	for _, p := range all {
		waitFor(t, "the cache", func() bool { return hits(p) })
	}
	a.manage("DELETE", "/manage/projects/"+a.project+"/cache", "", 200, nil)
	waitEverywhere(t, "the empty cache", others, func(p *testProxy) bool {
		res := p.cachedChat(p.token, `"user":"cached"`, "Cache-Control", "only-if-cached")
		return res.status == 504
	})
	a.provider.setScript(replyScript(401, `{"error":{"message":"no","code":"invalid_api_key"}}`))
	a.chatAs(a.token)
	if got := a.healthOf(a.upstream); got.State != "quarantined" {
		t.Errorf("a refused key is %v", got)
	}
	waitEverywhere(t, "a refused key", others, func(p *testProxy) bool {
		return p.healthOf(a.upstream).State == "quarantined"
	})
	a.provider.setScript(chatScript)
	a.changeUpstream(a.upstream, `"api_key":"sk-provider-third-0123456789abcdefghijklmnop"`)
	waitEverywhere(t, "a new key", others, func(p *testProxy) bool {
		return p.healthOf(a.upstream).State == "ready" && p.chatAs(p.token).status == 200
	})
}

// TestClusterDividesKeyLimits: what a key itself may do in a minute is divided among the replicas, however little that
// is.
func TestClusterDividesKeyLimits(t *testing.T) {
	requirePostgres(t)
	a := newTest(t, map[string]string{"ENCRYPTION_KEY": goodKey})
	a.changeUpstream(a.upstream, `"requests_per_minute":5`)
	all := []*testProxy{a, a.newReplica(nil, nil), a.newReplica(nil, nil)}
	for _, limit := range []int64{1, 2, 3, 5, 1_000_000_000} {
		waitFor(t, "a limit that is divided", func() bool {
			var sum int64
			for _, p := range all {
				sum += p.instance.store.shareOf(limit)
			}
			return sum == limit
		})
	}
	for {
		began, answered := time.Now().Unix()/60, 0
		for n := range 18 {
			if all[n%3].chatAs(a.token).status == 200 {
				answered++
			}
		}
		if began != time.Now().Unix()/60 {
			continue
		}
		if answered != 5 {
			t.Errorf("%d calls were answered in a minute, the limit is 5", answered)
		}
		return
	}
}

// TestClusterRevokesStreams: running calls at all replicas end when their token is revoked at one of them, or when all
// tokens of its project are, however many there are.
func TestClusterRevokesStreams(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	all[0].provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return !c.waitClosed(hangTimeout)
	})
	for i, revoke := range [][2]string{{"DELETE", "/manage/tokens/" + all[0].tokenID},
		{"POST", "/manage/projects/" + all[0].project + "/tokens/revoke"},
		{"DELETE", "/manage/projects/" + all[0].project},
	} {
		var streams []*clientStream
		for _, p := range all {
			streams = append(streams, p.stream(p.token))
		}
		for _, s := range streams {
			if _, err := s.read(20); err != nil {
				t.Fatal(err)
			}
		}
		var many [][32]byte
		if i > 0 {
			many = all[2].addLiveTokens(5000)
		}
		all[0].manage(revoke[0], revoke[1], "", 200, nil)
		elapsed := stopwatch(t)
		for i, s := range streams {
			if _, err := s.readAll(); err == nil {
				t.Error("a stream ended as if it were complete")
			}
			if took := elapsed(); took > everywhere {
				t.Errorf("%s: the stream of replica %d ended after %s", revoke, i, took)
			}
		}
		if !all[2].areRevoked(many) {
			t.Errorf("%s: a token is not revoked", revoke)
		}
		if i < 2 {
			_, token := all[0].newToken(`"name":"next"`)
			for _, p := range all {
				p.token = token
			}
		}
	}
}

// A cuttable is a TCP proxy in front of the PostgreSQL server of the tests.
type cuttable struct {
	url string // of the database of a test, through the proxy

	mu      sync.Mutex
	changed *sync.Cond
	refuses bool // connections are closed
	stalls  bool // nothing passes
	conns   map[net.Conn]bool
}

// newCuttable starts a proxy for a database on the server of the tests.
func newCuttable(t *testing.T, database string) *cuttable {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	network, server := "tcp", u.Host
	if dir := u.Query().Get("host"); dir != "" {
		network, server = "unix", dir+"/.s.PGSQL.5432"
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &cuttable{conns: map[net.Conn]bool{}}
	p.changed = sync.NewCond(&p.mu)
	p.url = fmt.Sprintf("postgres://postgres@%s%s?sslmode=disable", l.Addr(), u.Path)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial(network, server)
			if err != nil || !p.add(client, server) {
				client.Close()
				continue
			}
			serving.Go(func() { p.relay(client, server) })
			serving.Go(func() { p.relay(server, client) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.set(true, false)
		serving.Wait()
	})
	return p
}

// add returns false if connections are refused.
func (p *cuttable) add(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		if p.refuses {
			c.Close()
		} else {
			p.conns[c] = true
		}
	}
	return !p.refuses
}

// set closes all connections and refuses new ones, or lets nothing pass, or restores both.
func (p *cuttable) set(refuses, stalls bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuses, p.stalls = refuses, stalls
	for c := range p.conns {
		if refuses {
			c.Close()
			delete(p.conns, c)
		}
	}
	p.changed.Broadcast()
}

func (p *cuttable) relay(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		p.mu.Lock()
		for p.stalls {
			p.changed.Wait()
		}
		p.mu.Unlock()
		if _, writeErr := to.Write(b[:n]); err != nil || writeErr != nil {
			return
		}
	}
}

func fastReplicas() map[string]string {
	return map[string]string{"STALE_LIMIT": "1s", "REPLICA_TIMEOUT": "2s", "DATABASE_TIMEOUT": "5s"}
}

// waitLong waits longer than the REPLICA_TIMEOUT of fastReplicas.
func waitLong(t *testing.T) {
	t.Helper()
	began := time.Now()
	waitFor(t, "time to pass", func() bool { return time.Since(began) > 3*time.Second })
}

// TestClusterCutOff: a replica without the database admits nothing, with Retry-After; its streams go on. When it is
// back, it knows what has changed before it admits a call. Nobody is closed because the database was away for all.
func TestClusterCutOff(t *testing.T) {
	requirePostgres(t)
	direct := newReplicas(t, 1, fastReplicas())[0]
	cut := newCuttable(t, direct.env["DATABASE_URL"])
	p := direct.newReplica(map[string]string{"DATABASE_URL": cut.url}, nil)
	p.allowErrors = true
	release := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if !strings.Contains(r.body, `"stream":true`) {
			return chatScript(c, r)
		}
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		<-release
		for _, e := range chatEvents(true)[1:] {
			_ = c.chunk(e)
		}
		return c.chunk("") == nil
	})
	id, revoked := direct.newToken(`"name":"revoked"`)
	if res := p.chatAs(revoked); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	stream := p.stream(p.token)
	if _, err := stream.read(20); err != nil {
		t.Fatal(err)
	}
	cut.set(true, false)
	waitFor(t, "503", func() bool {
		res := p.chat()
		return res.status == 503 && res.header.Get("Retry-After") != ""
	})
	waitFor(t, "readyz 503", func() bool { return p.do("GET", "/readyz", "").status == 503 })
	if res := p.do("GET", "/healthz", ""); res.status != 200 {
		t.Errorf("healthz: %d", res.status)
	}
	direct.manage("DELETE", "/manage/tokens/"+id, "", 200, nil)
	cut.set(false, false)
	waitFor(t, "an answer other than 503", func() bool {
		res := p.chatAs(revoked)
		if res.status == 200 {
			t.Error("a token that was revoked meanwhile was admitted")
		}
		return res.status == 401
	})
	waitFor(t, "calls again", func() bool { return p.chat().status == 200 })
	close(release)
	if text, err := stream.readAll(); err != nil || !strings.Contains(text, "[DONE]") {
		t.Errorf("the stream: %q %v", text, err)
	}
	for _, row := range p.ledger() {
		if row.Stream && row.Outcome != "ok" {
			t.Errorf("a call: %+v", row)
		}
	}
}

// TestClusterDatabaseAway: when the database was away for all replicas, longer than REPLICA_TIMEOUT, all come back.
func TestClusterDatabaseAway(t *testing.T) {
	requirePostgres(t)
	first := newReplicas(t, 1, fastReplicas())[0]
	cut := newCuttable(t, first.env["DATABASE_URL"])
	var all []*testProxy
	for range 2 {
		p := first.newReplica(map[string]string{"DATABASE_URL": cut.url}, nil)
		p.allowErrors = true
		all = append(all, p)
	}
	if err := first.stop(); err != nil { // so that only those lead that are cut off
		t.Fatal(err)
	}
	waitFor(t, "a leader", func() bool { return countLeaders(all) == 1 })
	cut.set(true, false)
	waitLong(t)
	cut.set(false, false)
	for _, p := range all {
		waitFor(t, "calls again", func() bool { return p.chat().status == 200 })
	}
	waitFor(t, "a leader again", func() bool { return countLeaders(all) == 1 })
	waitLong(t)
	for _, p := range all {
		if res := p.chat(); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
}

// TestClusterFenced: a replica that did not answer is closed, its calls become lost ones, once, and its slot is free.
// It commits nothing afterwards, ends its calls and itself.
func TestClusterFenced(t *testing.T) {
	requirePostgres(t)
	direct := newReplicas(t, 1, fastReplicas())[0]
	cut := newCuttable(t, direct.env["DATABASE_URL"])
	p := direct.newReplica(map[string]string{"DATABASE_URL": cut.url, "DRAIN_DELAY": "30s"}, nil)
	p.allowErrors = true
	release := make(chan struct{})
	defer close(release)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return !c.waitClosed(hangTimeout) && false
	})
	stream := p.stream(p.token)
	if _, err := stream.read(20); err != nil {
		t.Fatal(err)
	}
	slot := p.instance.store.backend.slot()
	cut.set(false, true)
	var list struct{ Data []requestEntry }
	waitFor(t, "a lost call", func() bool {
		direct.manage("GET", "/manage/requests?outcome=lost", "", 200, &list)
		return len(list.Data) == 1
	})
	waitFor(t, "a free slot", func() bool {
		rows, err := direct.instance.store.backend.listReplicas(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(rows) == 1
	})
	if res := p.chat(); res.status != 503 {
		t.Errorf("a call at a closed replica: %d %s", res.status, res.body)
	}
	next := direct.newReplica(nil, nil)
	if got := next.instance.store.backend.slot(); got != slot {
		t.Errorf("the next replica has slot %d, not %d", got, slot)
	}
	cut.set(false, false)
	if _, err := stream.readAll(); err == nil {
		t.Error("the stream of a closed replica ended as if it were complete")
	}
	waitFor(t, "its end", func() bool {
		select {
		case <-p.instance.fenced:
			return true
		default:
			return false
		}
	})
	began := time.Now()
	if err := p.stop(); !errors.Is(err, errFenced) {
		t.Errorf("it ended with %v", err)
	}
	log := string(p.log.bytes())
	if d := time.Since(began); d > 5*time.Second || strings.Contains(log, `"error":null`) ||
		strings.Contains(log, "could not be returned") ||
		!strings.Contains(log, "calls that ended are kept in a file") {
		t.Errorf("it ended after %v: %s", d, log[max(0, len(log)-2000):])
	}
	if _, err := os.Stat(p.instance.cfg.unwrittenFile()); err != nil {
		t.Errorf("the call that it ended: %v", err)
	}
	direct.manage("GET", "/manage/requests", "", 200, &list)
	if len(list.Data) != 1 || list.Data[0].Outcome != "lost" {
		t.Errorf("the calls: %+v", list.Data)
	}
}

// TestClusterLeaderFrozen: a leader that does not answer, but whose connection is open, is replaced and closed.
func TestClusterLeaderFrozen(t *testing.T) {
	requirePostgres(t)
	first := newReplicas(t, 1, fastReplicas())[0]
	cut := newCuttable(t, first.env["DATABASE_URL"])
	frozen := first.newReplica(map[string]string{"DATABASE_URL": cut.url}, nil)
	frozen.allowErrors = true
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a leader", frozen.instance.store.isLeader)
	other := first.newReplica(nil, nil)
	cut.set(false, true)
	waitFor(t, "another leader", other.instance.store.isLeader)
	if frozen.instance.store.isLeader() {
		t.Error("two replicas lead")
	}
	cut.set(false, false)
	waitFor(t, "its end", func() bool { return frozen.do("GET", "/healthz", "").err != nil })
	if err := frozen.stop(); !errors.Is(err, errFenced) {
		t.Errorf("it ended with %v", err)
	}
}

// TestClusterClocks: replicas whose clocks are minutes apart agree on the time of limits. They are in one process:
// the processes of one machine have one wall clock, which e2e/cluster cannot change.
func TestClusterClocks(t *testing.T) {
	requirePostgres(t)
	a := newReplicas(t, 1, nil)[0]
	var set atomic.Int64 // nanoseconds by which somebody sets the clock
	b := a.newReplica(nil, func() time.Time { return time.Now().Add(2*time.Minute + time.Duration(set.Load())) })
	of := func(p *testProxy) int64 { return p.instance.store.backend.limitNow() }
	if d := of(a) - of(b); max(d, -d) > 100 {
		t.Errorf("the clocks of limits are %d ms apart", d)
	}
	waitFor(t, "the offset", func() bool {
		var list struct{ Data []replicaView }
		a.manage("GET", "/manage/replicas", "", 200, &list)
		if len(list.Data) != 2 {
			t.Fatalf("%+v", list.Data)
		}
		d := list.Data[1].OffsetMS + 120_000
		return max(d, -d) < 100
	})
	waitFor(t, "a warning", func() bool { return strings.Contains(string(b.log.bytes()), "clock differs") })
	set.Store(int64(-3 * time.Hour))
	if d := of(a) - of(b); max(d, -d) > 100 {
		t.Errorf("after a clock was set, the clocks of limits are %d ms apart", d)
	}
}

// openReplicas opens a database as n replicas, without their heartbeats.
func openReplicas(t *testing.T, url string, n int) (all []*postgres) {
	t.Helper()
	config := testPostgresConfig(url)
	config.replicated = true
	for range n {
		p, err := newPostgres(t.Context(), config, true)
		if err != nil {
			t.Fatal(err)
		}
		p.started()
		p.cluster.hooks = &replicaHooks{describe: func(*replicaInfo) {}, warn: func(string, ...any) {}}
		t.Cleanup(func() { _ = p.store.close() })
		all = append(all, p)
	}
	return all
}

// TestClusterPeers: a replica that was frozen, together with others, closes none of them for the time in which it did
// not look. One that is closed leads no more.
func TestClusterPeers(t *testing.T) {
	requirePostgres(t)
	all := openReplicas(t, newTestDatabase(t), 2)
	a, b := all[0].cluster, all[1].cluster
	if !a.isLeader() || b.isLeader() {
		t.Fatal("the first replica does not lead")
	}
	w := peerWatch{peers: map[int64]peer{}}
	look := func(passed time.Duration) (open bool) {
		t.Helper()
		a.began = a.began.Add(-passed)
		if err := a.closeDead(t.Context(), &w, 10*time.Second); err != nil {
			t.Fatal(err)
		}
		beats, err := a.readBeats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(beats) == 1
	}
	if !look(0) || !look(time.Minute) {
		t.Error("a replica was closed after both were frozen")
	}
	if err := b.beat(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := 0; look(time.Second); n++ {
		if n == 12 {
			t.Fatal("a silent replica was not closed")
		}
	}
	_ = b.beat(t.Context()) // its connection was ended
	if err := b.beat(t.Context()); !errors.Is(err, errFenced) {
		t.Errorf("a heartbeat of a closed replica: %v", err)
	}

	c := openReplicas(t, all[0].config.url(), 1)[0].cluster
	if _, err := a.db.store.writeDB.Exec(`UPDATE replicas SET epoch = epoch + 1, closed_at = 1 WHERE id = ` +
		strconv.FormatInt(a.db.replica, 10)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := a.beat(t.Context()); !errors.Is(err, errFenced) {
			t.Errorf("a heartbeat of the leader that is closed: %v", err)
		}
	}
	if err := c.beat(t.Context()); err != nil || !c.isLeader() {
		t.Errorf("nobody leads after the leader was closed: %v", err)
	}
}

// TestClusterStreams: running calls are listed and ended at any replica, and an erased end user is forgotten at all.
func TestClusterStreams(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 2, nil)
	a, b := all[0], all[1]
	a.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return !c.waitClosed(hangTimeout) && false
	})
	stream := b.stream(b.token, `"user":"erase-me"`)
	if _, err := stream.read(20); err != nil {
		t.Fatal(err)
	}
	var list struct {
		Data   []streamView
		Silent []int64 `json:"silent_replicas"`
	}
	a.manage("GET", "/manage/streams", "", 200, &list)
	if len(list.Data) != 1 || len(list.Silent) != 0 || list.Data[0].TokenID != b.tokenID || list.Data[0].EndUser == "" {
		t.Fatalf("%+v", list)
	}
	a.manage("DELETE", "/manage/projects/"+a.project+"/end-users?end_user=erase-me", "", 200, nil)
	var after struct{ Data []streamView }
	a.manage("GET", "/manage/streams", "", 200, &after)
	if len(after.Data) != 1 || after.Data[0].EndUser != "" {
		t.Errorf("%+v", after)
	}
	a.manage("DELETE", "/manage/streams/"+list.Data[0].ID, "", 200, nil)
	elapsed := stopwatch(t)
	if _, err := stream.readAll(); err == nil || elapsed() > everywhere {
		t.Errorf("%v after %s", err, elapsed())
	}
	if call := a.lastCallOf(b); call.ErrorCode != "cut_by_administrator" || call.EndUser != "" {
		t.Errorf("%+v", call)
	}
	a.manage("DELETE", "/manage/streams/"+list.Data[0].ID, "", 404, nil)
}

// lastCallOf returns the last call in the ledger, once the calls of another replica are written.
func (p *testProxy) lastCallOf(other *testProxy) requestEntry {
	p.t.Helper()
	other.waitSettled()
	return p.lastCall()
}

// TestClusterUnknownCommit: a change whose commit failed counts as one of another replica: if the database has it all
// the same, this replica puts it in force, too.
func TestClusterUnknownCommit(t *testing.T) {
	requirePostgres(t)
	p := openReplicas(t, newTestDatabase(t), 1)[0]
	sl, err := sealerFromKey(newEncryptionKey())
	if err == nil {
		err = p.store.setSetting(t.Context(), keyCheckSetting, sealKeyCheck(sl, true))
	}
	if err == nil {
		err = p.store.openAudit(t.Context(), sl, systemOrigin(time.Now()))
	}
	own := func() int {
		p.cluster.mu.Lock()
		defer p.cluster.mu.Unlock()
		return len(p.cluster.own)
	}
	before := own()
	if err == nil {
		_, err = p.store.writeDB.Exec(`CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
			AS 'BEGIN RAISE check_violation; END'; CREATE CONSTRAINT TRIGGER refusal AFTER INSERT ON audit
			DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`)
	}
	if err != nil {
		t.Fatal(err)
	}
	event := auditEvent{action: actionEmptyCache, object: "p"}
	if err := p.store.recordAuditEvent(t.Context(), systemOrigin(time.Now()), event); err == nil || own() != before {
		t.Errorf("%v; %d changes are its own, %d were", err, own(), before)
	}
	if _, err := p.store.writeDB.Exec(`DROP FUNCTION refuse CASCADE`); err != nil {
		t.Fatal(err)
	}
	if err := p.store.recordAuditEvent(t.Context(), systemOrigin(time.Now()), event); err != nil || own() != before+1 {
		t.Errorf("%v; %d changes are its own, %d were", err, own(), before)
	}
}
