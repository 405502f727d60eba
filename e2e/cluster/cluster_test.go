package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const callers = 200

// TestCluster runs all cases on one cluster of three replicas, and checks the ledger after each.
func TestCluster(t *testing.T) {
	c := newCluster(t, 3)
	for _, tt := range []struct {
		name string
		run  func(*cluster, *testing.T)
	}{
		{"limits", (*cluster).testLimits},
		{"changes", (*cluster).testChanges},
		{"revocation", (*cluster).testRevocation},
		{"frozen", (*cluster).testFrozen},
		{"connections", (*cluster).testConnections},
		{"database", (*cluster).testDatabase},
	} {
		ok := t.Run(tt.name, func(t *testing.T) {
			c.t = t
			tt.run(c, t)
			c.awaitAll()
			c.checkLedger()
		})
		if c.t = t; !ok {
			return
		}
	}
}

// A limitCase is a limit of a token, and how many calls it may let through.
type limitCase struct {
	name, fields string
	n            int
	slack        int  // calls that may be admitted beyond n
	left         int  // calls that may be refused before n, because they might need more than is left
	concurrent   bool // n calls at the same time
}

func limitCases() []limitCase {
	policy := func(limit string) string { return `"policy":{"limits":[{` + limit + `}]}` }
	return []limitCase{
		{name: "max_requests", fields: `"max_requests":90`, n: 90},
		{name: "day", fields: policy(`"count":"requests","max":90,"per":"day"`), n: 90},
		{name: "lifetime", fields: policy(`"count":"requests","max":90,"per":"lifetime"`), n: 90},
		// A bucket refills while the round runs.
		{name: "minute", fields: policy(`"count":"requests","max":90,"per":"minute"`), n: 90, slack: 60},
		{name: "concurrent", fields: policy(`"count":"concurrent","max":7`), n: 7, concurrent: true},
		// A call has 10 tokens, and may need some more.
		{name: "tokens", fields: policy(`"count":"tokens","max":900,"per":"day"`), n: 90, left: 5},
		{name: "each user", fields: policy(`"for_each":"end_user","count":"requests","max":90,"per":"day"`), n: 90},
	}
}

// testLimits: 200 callers at all replicas get exactly what a limit admits, also when a replica is killed meanwhile.
func (c *cluster) testLimits(t *testing.T) {
	cases := limitCases()
	for round := range rounds() {
		limit := cases[round%len(cases)]
		if rounds() < len(cases) { // all at once
			var wg sync.WaitGroup
			for _, limit := range cases {
				_, token := c.newToken(limit.fields)
				wg.Go(func() { c.tryLimit(t, limit, token, fmt.Sprintf("%s %d", limit.name, round), callers/len(cases), nil) })
			}
			wg.Wait()
		}
		_, token := c.newToken(limit.fields)
		victim := c.replicas[round%len(c.replicas)]
		c.tryLimit(t, limit, token, fmt.Sprintf("%s, killed %d", limit.name, round), callers, victim)
		c.awaitAll()
	}
}

// tryLimit makes calls from many callers until each was refused. victim, if not nil, is killed amid them.
func (c *cluster) tryLimit(t *testing.T, limit limitCase, token, user string, callers int, victim *replica) {
	var mu sync.Mutex
	statuses := map[int]int{}
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			refused := 0
			for range 40 {
				status := c.call(c.replicas[i%len(c.replicas)], token, user)
				mu.Lock()
				statuses[status]++
				mu.Unlock()
				if status != 200 {
					if refused++; refused == 3 {
						return
					}
					time.Sleep(20 * time.Millisecond)
				}
			}
		})
	}
	if victim != nil {
		waitFor(t, "half of the calls", hangTimeout, func() bool {
			calls, _ := c.provider.counted(user)
			return calls >= limit.n/2
		})
		victim.kill()
		victim.restart()
	}
	wg.Wait()
	calls, most := c.provider.counted(user)
	switch {
	case limit.concurrent:
		if most > limit.n || calls < limit.n {
			t.Errorf("%s: %d calls ran at the same time, the limit is %d (%v)", user, most, limit.n, statuses)
		}
	case calls > limit.n+limit.slack:
		t.Errorf("%s: the provider got %d calls, the limit is %d (%v)", user, calls, limit.n, statuses)
	case victim == nil && statuses[200] < limit.n-limit.left:
		t.Errorf("%s: %d calls were answered and %d reached the provider, of %d (%v)", user, statuses[200], calls, limit.n, statuses)
	}
}

// testChanges: while 200 callers call all replicas, a limit is raised, lowered, removed and set again, a replica is killed,
// and another is stopped until it is closed. No call goes beyond what the limit says at that time.
func (c *cluster) testChanges(t *testing.T) {
	const user, limit = "changes", `{"count":"requests","max":%d,"per":"day"}`
	id, token := c.newToken(`"policy":{"limits":[` + fmt.Sprintf(limit, 60) + `]}`)
	set := func(limits string) {
		c.manage(0, "PATCH", "/manage/tokens/"+id, json.RawMessage(`{"policy":{"limits":[`+limits+`]}}`), nil)
	}
	made := func() int { n, _ := c.provider.counted(user); return n }
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for i := range 200 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if c.call(c.replicas[i%3], token, user) != 200 {
					time.Sleep(50 * time.Millisecond)
				}
			}
		})
	}
	end := sync.OnceFunc(func() { close(stop); callers.Wait() })
	defer end()
	// settled waits until no call has been made for two seconds, and checks how many the provider got and how many are
	// recorded. The second can be more: a killed replica had admitted calls that never reached the provider.
	settled := func(what string, most, mostRecorded int) {
		t.Helper()
		last, since := made(), time.Now()
		waitFor(t, what+": a limit that is reached", hangTimeout, func() bool {
			if n := made(); n != last {
				last, since = n, time.Now()
			}
			return time.Since(since) > 2*time.Second
		})
		if recorded, _ := strconv.Atoi(c.sql(`SELECT count(*) FROM requests WHERE outcome <> 'refused' AND token =
			(SELECT seq FROM tokens WHERE id = '` + id + `')`)); last > most || recorded > mostRecorded || last < most/2 {
			t.Errorf("%s: the provider got %d calls of %d, %d are recorded of %d", what, last, most, recorded, mostRecorded)
		}
	}
	settled("set", 60, 60)
	set(fmt.Sprintf(limit, 400))
	waitFor(t, "calls", hangTimeout, func() bool { return made() >= 100 })
	c.replicas[1].kill()
	c.replicas[1].restart()
	settled("raised, and a replica killed", 400, 400)
	before := made()
	set(fmt.Sprintf(limit, 200))
	settled("lowered", before, 400)
	set(fmt.Sprintf(limit, 900))
	waitFor(t, "more calls", hangTimeout, func() bool { return made() >= before+100 })
	frozen := c.replicas[2]
	if err := frozen.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the frozen replica to be closed", hangTimeout, func() bool {
		return c.sql(`SELECT count(*) FROM replicas WHERE closed_at IS NULL`) == "2"
	})
	set("") // of which the frozen one does not hear
	waitFor(t, "calls without a limit", hangTimeout, func() bool { return made() >= 1000 })
	// The limit counts what was called before it was set. The other replica learns of it within a second, and what it
	// admits until then counts in no limit.
	before = made()
	most := before + 4000
	set(fmt.Sprintf(limit, most))
	time.Sleep(time.Second)
	uncounted := made() - before
	if err := frozen.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	settled("removed and set again, and a replica frozen", most+uncounted, most+uncounted)
	end()
	c.awaitAll()
	var view struct {
		Limits []struct{ Used float64 }
	}
	var recorded float64
	waitFor(t, "a count that equals the rows", hangTimeout, func() bool {
		c.manage(0, "GET", "/manage/tokens/"+id, nil, &view)
		recorded, _ = strconv.ParseFloat(c.sql(`SELECT count(*) FROM requests WHERE outcome <> 'refused' AND token =
			(SELECT seq FROM tokens WHERE id = '`+id+`')`), 64)
		return len(view.Limits) == 1 && view.Limits[0].Used <= recorded && view.Limits[0].Used >= recorded-float64(uncounted)
	})
}

// testRevocation: a token that one replica revokes is refused by the others within a second, and its streams end.
func (c *cluster) testRevocation(t *testing.T) {
	n := 12
	if isLong() {
		n = 100
	}
	var took []time.Duration
	for range n {
		id, token := c.newToken(`"max_requests":1000000`)
		var streams []*stream
		for _, r := range c.replicas[1:] {
			if status := c.call(r, token, "revoked"); status != 200 {
				t.Fatalf("before: %d", status)
			}
			streams = append(streams, c.stream(r, token))
		}
		begin := time.Now()
		c.manage(0, "DELETE", "/manage/tokens/"+id, nil, nil)
		if status := c.call(c.replicas[0], token, "revoked"); status != 401 {
			t.Errorf("the answering replica: %d", status)
		}
		for i, r := range c.replicas[1:] {
			waitFor(t, "a revoked token to be refused", hangTimeout, func() bool { return c.call(r, token, "revoked") == 401 })
			took = append(took, time.Since(begin))
			select {
			case <-streams[i].ended:
			case <-time.After(hangTimeout):
				t.Errorf("a stream of a revoked token goes on at %s", r.name)
			}
			took = append(took, time.Since(begin))
		}
	}
	slices.Sort(took)
	p99 := took[len(took)*99/100]
	t.Logf("a revocation holds everywhere after %v at the median, p99 %v", took[len(took)/2], p99)
	if p99 > time.Second {
		t.Errorf("p99 is %v", p99)
	}
}

// testFrozen: a replica that is stopped for longer than REPLICA_TIMEOUT spends nothing that was given to others.
func (c *cluster) testFrozen(t *testing.T) {
	frozen, freeze := c.replicas[2], 8*time.Second
	if isLong() {
		freeze = 20 * time.Second
	}
	_, token := c.newToken(`"max_requests":60`)
	user := "frozen"
	for i := range 15 { // all have leases
		c.call(c.replicas[i%3], token, user)
	}
	if err := frozen.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	thawed := time.Now().Add(freeze)
	for time.Now().Before(thawed) {
		c.call(c.replicas[0], token, user)
		c.call(c.replicas[1], token, user)
		time.Sleep(50 * time.Millisecond)
	}
	if err := frozen.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		c.call(frozen, token, user)
	}
	c.awaitAll()
	for i := range 30 {
		c.call(c.replicas[i%3], token, user)
	}
	if calls, _ := c.provider.counted(user); calls > 60 || calls < 55 {
		t.Errorf("the provider got %d calls, the limit is 60", calls)
	}
}

// testConnections: replicas whose connections to the database are cut again and again go on without a lost call.
func (c *cluster) testConnections(t *testing.T) {
	_, token := c.newToken(`"max_requests":1000000`)
	end := time.Now().Add(4 * time.Second)
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			for time.Now().Before(end) {
				c.call(c.replicas[i%3], token, "connections")
			}
		})
	}
	for time.Now().Before(end) {
		c.sql(`SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = 'proxy' AND pid <> pg_backend_pid()`)
		time.Sleep(700 * time.Millisecond)
	}
	wg.Wait()
	c.awaitAll()
}

// testDatabase: while the database is away, calls get 503 and running streams go on. Calls come back by themselves.
func (c *cluster) testDatabase(t *testing.T) {
	outages := []time.Duration{3 * time.Second}
	if isLong() {
		outages = []time.Duration{3 * time.Second, time.Minute}
	}
	for _, outage := range outages {
		_, token := c.newToken(`"max_requests":1000000`)
		var streams []*stream
		for _, r := range c.replicas {
			streams = append(streams, c.stream(r, token))
		}
		c.stopDatabase()
		begin := time.Now()
		for _, r := range c.replicas {
			waitFor(t, "replica "+r.name+" not to be ready", hangTimeout, func() bool { return !r.isReady() })
			if status := c.call(r, token, "away"); status != 503 {
				t.Errorf("without the database %s answers %d", r.name, status)
			}
		}
		time.Sleep(outage - min(time.Since(begin), outage))
		for i, s := range streams {
			before := s.events()
			waitFor(t, "events of a stream", hangTimeout, func() bool { return s.events() > before })
			if i == 0 { // ends while the database is away, and its replica is killed before that is recorded
				s.cancel()
				kept := filepath.Join(c.replicas[0].data, "postgres.unwritten")
				waitFor(t, "the call to be kept in a file", hangTimeout, func() bool {
					text, _ := os.ReadFile(kept)
					return strings.Contains(string(text), `"client_gone"`)
				})
				c.replicas[0].kill()
			}
		}
		started := time.Now()
		c.startDatabase()
		c.replicas[0].await()
		back := time.Since(started)
		c.awaitAll()
		waitFor(t, "the killed replica's call", hangTimeout, func() bool {
			return c.outcomes()[streams[0].id] != ""
		})
		// The others may have declared the replica dead before it was back.
		mayBeLost := isLong() || back > shortReplicaTimeout
		if outcome := c.outcomes()[streams[0].id]; outcome != "client_gone" && !(outcome == "lost" && mayBeLost) {
			t.Errorf("the call that ended without the database is recorded as %s; its replica was back after %v", outcome, back)
		}
		for _, r := range c.replicas {
			waitFor(t, "a call", hangTimeout, func() bool { return c.call(r, token, "back") == 200 })
		}
		for _, s := range streams[1:] {
			s.cancel()
		}
	}
}

// checkLedger waits until nothing runs and checks that each call that a client saw answered is recorded once, that sums
// equal rows, and that the audit trail is whole.
func (c *cluster) checkLedger() {
	t := c.t
	t.Helper()
	waitFor(t, "the calls to be settled", hangTimeout, func() bool { return c.sql(`SELECT count(*) FROM running`) == "0" })
	var rows, sums string
	waitFor(t, "sums that equal the rows", hangTimeout, func() bool {
		rows = c.sql(`SELECT outcome, count(*) FROM requests WHERE outcome <> 'refused' GROUP BY 1 ORDER BY 1`)
		sums = c.sql(`SELECT outcome, sum(calls) FROM usage_sums WHERE grain = 'day' AND token = 0 AND project > 0
			AND outcome <> 'refused' GROUP BY 1 HAVING sum(calls) > 0 ORDER BY 1`)
		return rows == sums
	})
	recorded := c.sql(`SELECT count(*) FROM requests WHERE outcome <> 'refused'`)
	counted := c.sql(`SELECT sum(request_count) FROM tokens`)
	if recorded != counted {
		t.Errorf("%s calls are recorded, the tokens count %s", recorded, counted)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var ids []string
	for id, n := range c.answered {
		if n != 1 {
			t.Errorf("the id %q was given to %d calls", id, n)
		}
		ids = append(ids, id)
	}
	known := c.outcomes()
	missing := slices.DeleteFunc(ids, func(id string) bool { return known[id] == "ok" || known[id] == "lost" })
	if len(missing) > 0 {
		t.Errorf("%d calls that were answered are not recorded: %v", len(missing), missing[:min(len(missing), 5)])
	}
	file, _ := binary()
	verify := exec.Command(file, "audit", "verify")
	verify.Env = append(slices.Clone(c.env), "DATA_DIR="+c.replicas[0].data)
	if out, err := verify.CombinedOutput(); err != nil {
		t.Errorf("the audit trail: %v %s", err, out)
	}
}

// outcomes returns the outcome of each recorded call, by the id that its client got.
func (c *cluster) outcomes() map[string]string {
	c.t.Helper()
	out := map[string]string{}
	for line := range strings.Lines(c.sql(`SELECT id, outcome FROM requests WHERE outcome <> 'refused'`)) {
		id, outcome, _ := strings.Cut(strings.TrimSpace(line), "|")
		out[formatID(id)] = outcome
	}
	return out
}

// formatID writes the id of a row as clients see it: 13 digits of base 32.
func formatID(row string) string {
	const digits = "0123456789abcdefghjkmnpqrstvwxyz"
	var id int64
	_, _ = fmt.Sscan(row, &id)
	out := []byte("req_0000000000000")
	for i := len(out) - 1; i >= 4; i-- {
		out[i] = digits[id&31]
		id >>= 5
	}
	return string(out)
}
