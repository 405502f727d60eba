//go:build postgres

// These tests check limits that several replicas share: with real replicas on one PostgreSQL database, and the
// functions in the database against the model of ratelimit_leases_test.go.
package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestLeasesOfReplicas: of 150 calls at once over three replicas, exactly as many as a limit allows reach the provider,
// whatever it counts and whoever has made calls before.
func TestLeasesOfReplicas(t *testing.T) {
	requirePostgres(t)
	replicas := newReplicas(t, 3, map[string]string{"LOG_LEVEL": "error"})
	p := replicas[0]
	awaitClearOfHour(20 * time.Second)
	for i, c := range []struct {
		limit string
		want  int64
	}{
		{`"policy":{"limits":[{"count":"requests","max":20,"per":"day"}]}`, 20},
		{`"policy":{"limits":[{"count":"requests","max":20,"per":"lifetime","for_each":"end_user"}]}`, 20},
		{`"policy":{"limits":[{"count":"requests","max":20,"per":"hour","model":"gpt-4o*"}]}`, 20},
		{`"max_requests":7`, 7},
	} {
		_, token := p.newToken(fmt.Sprintf(`"name":"shared %d",%s`, i, c.limit))
		var answered atomic.Int64
		var clients sync.WaitGroup
		for n := range 150 {
			clients.Go(func() {
				if status, _ := replicas[n%3].send(nil, token, chatBody(`"max_tokens":10`)); status == 200 {
					answered.Add(1)
				}
			})
		}
		clients.Wait()
		if n := answered.Load(); n != c.want {
			t.Errorf("%s: %d calls were answered, want %d", c.limit, n, c.want)
		}
	}
}

// A leaseMirror does in a database what is done to a leaseTable, and compares the two.
type leaseMirror struct {
	t     *testing.T
	db    *sql.DB
	table *leaseTable
	name  string // of the case
	steps int
	epoch map[int64]int64 // of the replicas in the database
}

// newLeaseMirror returns a mirror with a clock that it sets.
func newLeaseMirror(t *testing.T) *leaseMirror {
	t.Helper()
	address := newTestDatabase(t)
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	// Functions of public come before those of the same name that the server has.
	connector, err := newPostgresConnector(testPostgresConfig(address), u,
		map[string]string{"search_path": "public,pg_catalog"})
	if err != nil {
		t.Fatal(err)
	}
	m := &leaseMirror{t: t, db: sql.OpenDB(connector)}
	m.db.SetMaxOpenConns(1)
	t.Cleanup(func() { m.db.Close() })
	m.exec(`CREATE TABLE test_clock (ms bigint NOT NULL);
		INSERT INTO test_clock VALUES (0);
		CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
			AS 'SELECT timestamptz ''epoch'' + ms * interval ''1 millisecond'' FROM public.test_clock'`)
	return m
}

func (m *leaseMirror) exec(query string, args ...any) {
	m.t.Helper()
	if _, err := m.db.Exec(query, args...); err != nil {
		m.t.Fatalf("%s: %v", m.name, err)
	}
}

// follow makes the database as empty as a table is, and does what is done to that from now on.
func (m *leaseMirror) follow(name string, table *leaseTable) {
	m.t.Helper()
	m.exec(`TRUNCATE limit_accounts, limit_leases, lease_exchanges, replicas CASCADE;
		ALTER SEQUENCE limit_incarnations RESTART`)
	m.name, m.table, m.steps, m.epoch = name, table, 0, map[int64]int64{}
	table.observe = m.step
}

// step repeats a step in the database.
func (m *leaseMirror) step(s leaseStep) {
	m.t.Helper()
	m.steps++
	m.exec(`UPDATE test_clock SET ms = ?`, m.table.now)
	for id, r := range m.table.replicas {
		if m.epoch[id] == 0 {
			m.exec(`INSERT INTO replicas (id, version, started_at, slot, epoch) VALUES (?, 'test', 0, ?, 1)`, id, id)
			m.epoch[id] = 1
		}
		if r.closed && m.epoch[id] == 1 {
			m.exec(`UPDATE replicas SET epoch = 2, closed_at = 1 WHERE id = ?`, id)
			m.epoch[id] = 2
		}
	}
	if s.ended != "" {
		m.exec(`SELECT lease_end(?::text, ?::bigint, ?::bigint)`, s.ended, s.replica, s.final)
		m.compare(s.ended)
		return
	}
	items, err := json.Marshal(s.items)
	if err != nil {
		m.t.Fatal(err)
	}
	replies, err := collect(m.t.Context(), m.db, "exchanging", (*leaseReply).columns, selectLeaseSync,
		s.replica, int64(1), s.number, "test", string(items))
	if err != nil {
		m.t.Fatalf("%s, step %d: %v", m.name, m.steps, err)
	}
	want := slices.Clone(s.replies)
	for _, list := range [][]leaseReply{want, replies} {
		for i := range list { // no more of those is used
			switch r := &list[i]; r.status {
			case leaseNeedsBase, leaseWindowEarly:
				*r = leaseReply{item: r.item, status: r.status}
			case leaseWindowOver:
				*r = leaseReply{item: r.item, status: r.status, windowStart: r.windowStart}
			}
		}
	}
	if !slices.Equal(replies, want) {
		m.t.Fatalf("%s, step %d: for %s\nthe database answers %+v,\nthe model          %+v", m.name, m.steps, items,
			replies, want)
	}
	for _, i := range s.items {
		m.compare(i.Account)
	}
}

// compare compares an account in the database with the one in the table.
func (m *leaseMirror) compare(account string) {
	m.t.Helper()
	var want, got string
	if acc := m.table.accounts[account]; acc != nil {
		want = fmt.Sprint(acc.incarnation, acc.version, acc.max, acc.windowStart, acc.base, acc.level, acc.levelAt,
			acc.recall, acc.recalledAt)
		var ids []int64
		for id := range acc.leases {
			ids = append(ids, id)
		}
		slices.Sort(ids)
		for _, id := range ids {
			l := acc.leases[id]
			want += fmt.Sprint(" | ", id, l.spent, l.unspent, l.busy, l.recent, l.recentFrom, l.seenRecall)
		}
	}
	if err := m.db.QueryRow(`
		SELECT coalesce((SELECT concat_ws(' ', incarnation, version, max, window_start, base, level, level_at, recall,
				recalled_at) FROM limit_accounts WHERE account = ?1), '') ||
			coalesce((SELECT string_agg(' | ' || concat_ws(' ', replica, spent, unspent, busy, recent, recent_from,
				seen_recall), '' ORDER BY replica) FROM limit_leases WHERE account = ?1), '')`,
		account).Scan(&got); err != nil {
		m.t.Fatal(err)
	}
	if got != want {
		m.t.Fatalf("%s, step %d, account %s: the database has\n%s, the model\n%s", m.name, m.steps, account, got, want)
	}
}

// TestLeaseModelIsTheDatabase: the functions lease_sync and lease_end do what the model does with which TestLeaseModel
// proves the limits: for the same exchanges of replicas, and for exchanges that no replica would make.
func TestLeaseModelIsTheDatabase(t *testing.T) {
	requirePostgres(t)
	mirror := newLeaseMirror(t)
	for seed := range uint64(12) {
		m := newLeaseModel(seed)
		mirror.follow(fmt.Sprintf("seed %d, %s", seed, m.limit), m.table)
		for range 300 {
			if err := m.step(); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.quiesce(); err != nil {
			t.Fatal(err)
		}
	}
	for seed := range uint64(4) {
		random := rand.New(rand.NewPCG(seed, 11))
		table := newLeaseTable()
		table.now = noon
		for id := range int64(4) {
			table.replicas[id+1] = &leaseReplica{}
		}
		mirror.follow(fmt.Sprintf("random items %d", seed), table)
		for number := range int64(200) {
			table.now += random.Int64N(400)
			replica := 1 + random.Int64N(4)
			if random.IntN(20) == 0 {
				table.replicas[replica].closed = true
				table.end(fmt.Sprint("account ", random.IntN(3)), replica, random.Int64N(30)-5)
				table.replicas[replica].closed = false
				if mirror.epoch[replica] == 2 {
					mirror.exec(`UPDATE replicas SET epoch = 1, closed_at = NULL WHERE id = ?`, replica)
					mirror.epoch[replica] = 1
				}
				continue
			}
			var items []leaseItem
			for account := range int64(3) {
				if random.IntN(3) > 0 {
					items = append(items, randomLeaseItem(random, table, replica, account, int64(len(items))))
				}
			}
			if len(items) > 0 {
				_, _ = table.exchange(replica, number+1-random.Int64N(3)/2, items) // some are late
			}
		}
	}
}

// randomLeaseItem returns an item for one of three accounts, each of another kind.
func randomLeaseItem(random *rand.Rand, table *leaseTable, replica, account, index int64) leaseItem {
	i := leaseItem{Index: index, Account: fmt.Sprint("account ", account), Project: 1, Rule: "{}", Kind: account,
		Version: 1 + random.Int64N(4), Max: 20 + random.Int64N(20), Spent: random.Int64N(30) - 3,
		Busy: random.Int64N(4), Recent: random.Int64N(5), RecentFrom: table.now - random.Int64N(5000),
		Want: random.Int64N(9), Asked: random.IntN(2) == 0, Added: random.IntN(8) == 0}
	i.Keep = i.Busy + random.Int64N(9)
	if i.Kind == leaseOfWindow {
		i.WindowStart = (table.now - table.now%10_000) - 10_000 + 10_000*random.Int64N(3)
		i.WindowEnd = i.WindowStart + 10_000
	} else {
		i.WindowEnd = table.now + dayMS
	}
	if i.Kind == leaseOfBucket {
		i.PeriodMS = 1000
	}
	if random.IntN(3) == 0 {
		i.Least = 1 + random.Int64N(6)
		i.Need = i.Least + random.Int64N(4)
	}
	if random.IntN(2) == 0 {
		i.Base = new(random.Int64N(10))
	}
	if acc := table.accounts[i.Account]; acc != nil {
		i.Incarnation = acc.incarnation * int64(random.IntN(10)/2%2)
		if l := acc.leases[replica]; l != nil && random.IntN(4) > 0 {
			i.Spent = l.spent + random.Int64N(5) - 1
		}
	}
	return i
}

// TestLateUseOfLeases: late usage counts in a bucket that was idle as in any other, and takes accounts in the order of
// the exchanges, so that none of them waits for another in a circle.
func TestLateUseOfLeases(t *testing.T) {
	requirePostgres(t)
	p := openReplicas(t, newTestDatabase(t), 1)[0]
	if _, err := p.store.writeDB.Exec(`INSERT INTO limit_accounts
		VALUES ('p1/a', 1, 0, '{}', 0, 0, 1, 1, 100, 0, 9000000000000000, 10, 0, 0, 0, 0),
			('p1/b', 1, 0, '{}', 1, 60000, 1, 1, 60, 0, 9000000000000000, 0, 0, 0, 0, 0)`); err != nil {
		t.Fatal(err)
	}
	exchange, err := p.leases.db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	const lock = `SELECT base FROM limit_accounts WHERE account = ?1 FOR UPDATE`
	var n int64
	if err := exchange.QueryRow(lock, "p1/a").Scan(&n); err != nil {
		t.Fatal(err)
	}
	now := time.Now().UnixMilli()
	usage := &requestRow{usageOf: now << idTimeShift, batch: "batch_1", model: "m", batchLines: 1, started: now,
		project: 1, token: 1, endpoint: "POST /v1/batches", outcome: outcomeOK, source: usageExact}
	batch := ledgerBatch{sumOnlyRows: []sumOnlyRow{{requestRow: usage,
		late: []lateLeaseUse{{Account: "p1/b", Amount: 30}, {Account: "p1/a", Amount: 5}}}}}
	var adding sync.WaitGroup
	adding.Go(func() {
		if err := p.store.newLedgerWriter().write(t.Context(), batch); err != nil {
			t.Error(err)
		}
	})
	p.awaitBlocked(t)
	if err := exchange.QueryRow(lock, "p1/b").Scan(&n); err != nil {
		t.Error(err)
	}
	if err := exchange.Commit(); err != nil {
		t.Error(err)
	}
	adding.Wait()
	if err := p.store.newLedgerWriter().write(t.Context(), batch); err != nil || usage.counted {
		t.Errorf("the same usage a second time: counted %v, %v", usage.counted, err)
	}
	var used, left int64
	if err := p.store.readDB.QueryRow(`SELECT
			(SELECT base FROM limit_accounts WHERE account = 'p1/a'),
			(SELECT (level - ((extract(epoch FROM clock_timestamp()) * 1000)::bigint - level_at) * max) / period_ms
				FROM limit_accounts WHERE account = 'p1/b')`).Scan(&used, &left); err != nil {
		t.Fatal(err)
	}
	if used != 15 || left < 20 || left > 30 {
		t.Errorf("the window has %d, the bucket %d", used, left)
	}
}

// TestAccountMadeAgain: an account that is made again does not begin with the leases of a deleted one. One that another
// replica makes at the same moment keeps its leases.
func TestAccountMadeAgain(t *testing.T) {
	requirePostgres(t)
	p := openReplicas(t, newTestDatabase(t), 1)[0]
	if _, err := p.store.writeDB.Exec(`INSERT INTO limit_leases
		VALUES ('p1/a', 77, 60, 30, 0, 0, 0, 0), ('p1/a', ?1, 5, 5, 0, 0, 0, 0)`, p.replica); err != nil {
		t.Fatal(err)
	}
	base := int64(1)
	item := leaseItem{Account: "p1/a", Project: 1, Rule: "{}", Max: 100, WindowEnd: endOfTime, Base: &base, Least: 10,
		Need: 10, Want: 10}
	replies, err := p.leases.exchange(t.Context(), []leaseItem{item})
	if err != nil || len(replies) != 1 || replies[0].unspent != 10 || replies[0].spent != 0 || replies[0].others != 1 {
		t.Errorf("%+v %v", replies, err)
	}
}

// TestDeadReplicaValues: of a replica that has died, the account of each value counts the calls with that value, those
// whose value is not known, and no others.
func TestDeadReplicaValues(t *testing.T) {
	requirePostgres(t)
	p := openReplicas(t, newTestDatabase(t), 1)[0]
	if _, err := p.store.writeDB.Exec(`INSERT INTO replicas (id, version, started_at, closed_at, slot)
		VALUES (77, 'old', 0, 1, 7)`); err != nil {
		t.Fatal(err)
	}
	now := time.Now().UnixMilli()
	var batch ledgerBatch
	ann, bob := &attribution{endUser: "ann"}, &attribution{endUser: "bob", tags: tagList{{"team", "x"}}}
	for i, a := range []*attribution{ann, ann, bob, {endUser: "a\x00b"}, nil,
		{session: "s", tags: tagList{{"team", "y"}}}} {
		id := now<<idTimeShift | 7<<idSlotShift | int64(i)
		batch.records = append(batch.records, &requestRow{id: id, started: now, project: 1,
			token: 2, model: "m", endpoint: "POST /v1/responses", outcome: outcomeOK, status: 200, source: usageNone,
			firstByteUS: -1, attempts: 1, attribution: a})
	}
	if err := p.store.newLedgerWriter().write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	for value, want := range map[[2]string]int64{{"end_user", "ann"}: 3, {"end_user", "bob"}: 2, {"end_user", "cid"}: 1,
		{"session", "s"}: 1, {"tag:team", "x"}: 1, {"tag:team", "z"}: 0, {"", ""}: 6} {
		owner := leaseOwner{project: 1, token: 2}
		rule := leaseRule(&limit{metric: metricRequests, period: perDay, forEach: value[0]})
		account := accountName(owner, rule, value[1])
		if _, err := p.store.writeDB.Exec(`INSERT INTO limit_accounts
			VALUES (?1, 1, 2, ?2, 0, 0, 1, 1, 100, 0, ?3, 10, 0, 0, 0, 0)`, account, rule, endOfTime); err != nil {
			t.Fatal(err)
		}
		if _, err := p.store.writeDB.Exec(`INSERT INTO limit_leases VALUES (?, 77, 20, 30, 0, 0, ?, 0)`, account,
			now-1000); err != nil {
			t.Fatal(err)
		}
		if err := p.leases.settleDead(t.Context(), 77); err != nil {
			t.Fatal(err)
		}
		base, err := queryValue[int64](t.Context(), p.store.readDB, "reading the account",
			`SELECT base FROM limit_accounts WHERE account = ?`, account)
		if base != 30+want || err != nil {
			t.Errorf("%s %q: %d calls count, want %d; %v", value[0], value[1], base-30, want, err)
		}
	}
}
