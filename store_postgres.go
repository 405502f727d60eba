//go:build postgres

// This file is how the program uses PostgreSQL: it checks DATABASE_URL, connects, translates the statements of
// store*.go once, brings the schema up to date, and keeps every other process out. A process that lost the database
// to another can commit nothing any more. The password is used here and nowhere else, and no error has it.
package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

const (
	minPostgresVersion = 150000 // as server_version_num
	// postgresLockClass is the first key of this program's advisory locks; the second names the schema.
	postgresLockClass      = 0x6c6c6d70
	postgresConnectTimeout = 5 * time.Second
	postgresCheckInterval  = time.Second
)

// postgresParameters are the parameters that DATABASE_URL may have. Others could turn off what the program relies on.
func postgresParameters() []string {
	return []string{"application_name", "host", "passfile", "port", "search_path", "sslcert", "sslkey", "sslmode",
		"sslrootcert", "target_session_attrs"}
}

// checkPostgresURL checks a DATABASE_URL. It returns it without its password, and what is dangerous about it.
func checkPostgresURL(text string) (name string, warnings []string, err error) {
	u, err := url.Parse(text)
	if err != nil {
		return "", nil, errors.New("is not a URL; write postgres://USER@HOST:PORT/DATABASE, with special characters " +
			"of the password as %XX")
	}
	query := u.Query()
	for key := range query {
		if !slices.Contains(postgresParameters(), key) {
			return "", nil, fmt.Errorf("has the parameter %s; only these are allowed: %s", clip(key, 64),
				strings.Join(postgresParameters(), ", "))
		}
	}
	if len(u.Path) < 2 {
		return "", nil, errors.New("names no database; write postgres://USER@HOST:PORT/DATABASE")
	}
	switch mode := query.Get("sslmode"); {
	case !slices.Contains([]string{"", "disable", "require", "verify-ca", "verify-full"}, mode):
		return "", nil, errors.New("has an sslmode that is none of: verify-full, verify-ca, require, disable")
	case isLocalPostgres(u):
	case mode == "disable":
		warnings = append(warnings, "sslmode=disable: the connection to the database is not encrypted")
	case mode == "require" && query.Get("sslrootcert") == "":
		warnings = append(warnings, "sslmode=require: the database's certificate is not verified")
	}
	if _, err := pq.NewConfig(postgresDSN(u)); err != nil {
		return "", nil, errors.New("cannot be used: " + withoutPassword(u, err))
	}
	return u.Redacted(), warnings, nil
}

// withoutPassword returns the text of an error without the password of u.
func withoutPassword(u *url.URL, err error) string {
	text := fmt.Sprint(err)
	if password, _ := u.User.Password(); password != "" {
		text = strings.ReplaceAll(text, password, hiddenSecret)
	}
	return clip(text, 300)
}

// isLocalPostgres reports whether connections stay on this machine.
func isLocalPostgres(u *url.URL) bool {
	host := u.Hostname()
	if h := u.Query().Get("host"); h != "" {
		host = h
	}
	addr, err := netip.ParseAddr(host)
	return host == "" || host == "localhost" || filepath.IsAbs(host) || err == nil && addr.IsLoopback()
}

// postgresDSN returns the URL with the TLS mode that holds unless it says otherwise: a certificate is verified, except
// on this machine.
func postgresDSN(u *url.URL) string {
	query := u.Query()
	if query.Get("sslmode") == "" {
		query.Set("sslmode", "verify-full")
		if isLocalPostgres(u) {
			query.Set("sslmode", "disable")
		}
	}
	changed := *u
	changed.RawQuery = query.Encode()
	return changed.String()
}

// A postgres is an open PostgreSQL database.
type postgres struct {
	config   *postgresConfig
	name     string
	store    *store
	ledgerDB *sql.DB // one connection, for what the ledger writes
	lockDB   *sql.DB // one connection, which has the exclusive lock
	lockKey  int32   // names the schema in advisory locks
	replica  int64   // 0: opened for reading
	epoch    int64
	slot     atomic.Int64 // in the ids of calls
	writer   postgresLedger

	lockConn *sql.Conn // of lockDB; nil: the lock is not held
	trouble  atomic.Pointer[string]
}

// openPostgres connects. With serve, it takes the exclusive lock, migrates, and closes the replicas of processes that
// have ended; otherwise every write fails.
func openPostgres(ctx context.Context, c *postgresConfig, serve bool) (_ *store, err error) {
	u, err := url.Parse(c.url())
	if err != nil {
		return nil, errors.New("DATABASE_URL is not a URL")
	}
	p := &postgres{config: c, name: u.Redacted(), store: &store{}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("database %s: %w", p.name, err)
			for _, db := range []*sql.DB{p.store.readDB, p.store.writeDB, p.ledgerDB, p.lockDB} {
				if db != nil {
					db.Close()
				}
			}
		}
	}()
	open := func(n int, parameters map[string]string) (*sql.DB, error) {
		connector, err := newPostgresConnector(c, u, parameters)
		if err != nil {
			return nil, err
		}
		db := sql.OpenDB(connector)
		db.SetMaxOpenConns(n)
		db.SetMaxIdleConns(n)
		return db, nil
	}
	readOnly := map[string]string{"default_transaction_read_only": "on"}
	if p.store.readDB, err = open(max(int(c.connections)-3, 2), readOnly); err != nil {
		return nil, err
	}
	p.store.backend = p.backend()
	if !serve {
		p.store.writeDB = p.store.readDB
		return p.store, p.checkServer(ctx)
	}
	for _, db := range []**sql.DB{&p.store.writeDB, &p.ledgerDB} {
		if *db, err = open(1, nil); err != nil {
			return nil, err
		}
	}
	// If this machine vanishes, the server notices within 20 s and releases the lock.
	if p.lockDB, err = open(1, map[string]string{"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "5",
		"tcp_keepalives_count": "3"}); err != nil {
		return nil, err
	}
	if err = p.checkServer(ctx); err != nil {
		return nil, err
	}
	if err = p.takeLock(ctx); err != nil {
		return nil, err
	}
	if err = p.migrate(ctx); err != nil {
		return nil, err
	}
	return p.store, p.register(ctx)
}

func (p *postgres) backend() *backend {
	return &backend{
		version: p.version, differences: p.differences, startTx: p.startTx, writeLedger: p.writer.write,
		size: p.size, vacuum: p.vacuum, problem: p.problem, watch: p.watch, close: p.close, slot: p.slot.Load,
		lastRequestID: p.lastRequestID, closedReplicas: p.closedReplicas, pendingRecords: p.pendingRecords,
		deletePending: p.deletePending,
	}
}

func (p *postgres) close() error {
	if p.lockDB == nil {
		return nil
	}
	if p.lockConn != nil {
		_ = p.lockConn.Close()
	}
	return errors.Join(p.ledgerDB.Close(), p.lockDB.Close()) // the server releases the lock
}

// checkServer returns an error if the server cannot be used.
func (p *postgres) checkServer(ctx context.Context) error {
	var version int
	var encoding, schema string
	var standby bool
	err := p.store.readDB.QueryRowContext(ctx, `
		SELECT current_setting('server_version_num')::integer, current_setting('server_encoding'),
			coalesce(current_schema(), ''), pg_is_in_recovery()`).Scan(&version, &encoding, &schema, &standby)
	switch {
	case err != nil:
		return fmt.Errorf("connecting: %w", err)
	case version < minPostgresVersion:
		return fmt.Errorf("the server is PostgreSQL %d; this program needs 15 or later", version/10000)
	case encoding != "UTF8":
		return fmt.Errorf("its encoding is %s; create a database with ENCODING 'UTF8' TEMPLATE template0", encoding)
	case schema == "":
		return errors.New("no schema of its search_path exists")
	case standby:
		return errors.New("the server is a standby, which cannot be written; name the primary")
	}
	h := fnv.New32a()
	h.Write([]byte(schema))
	p.lockKey = int32(h.Sum32())
	return nil
}

// takeLock takes the exclusive lock of the database, or returns an error if another process has it.
func (p *postgres) takeLock(ctx context.Context) error {
	conn, err := p.lockDB.Conn(ctx)
	if err != nil {
		return fmt.Errorf("connecting: %w", err)
	}
	taken := false
	for attempts := 10; err == nil && !taken && attempts > 0; attempts-- {
		if err = conn.QueryRowContext(ctx, `SELECT pg_try_advisory_lock(?, ?)`, postgresLockClass, p.lockKey).
			Scan(&taken); err == nil && !taken {
			time.Sleep(50 * time.Millisecond) // the server may not have noticed yet that a process has ended
		}
	}
	if err == nil && !taken {
		err = errors.New("another llm-proxy is using it; stop that one, or set another DATABASE_URL for this one")
	}
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	p.lockConn = conn
	return nil
}

// register closes the replicas of processes that have ended, and adds this one. From then on the others can commit
// nothing.
func (p *postgres) register(ctx context.Context) error {
	tx, err := p.store.writeDB.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // without effect after Commit
	now := time.Now().UnixMilli()
	if _, err := execCount(ctx, tx, "closing other replicas", `
		UPDATE replicas SET epoch = epoch + 1, closed_at = ? WHERE closed_at IS NULL`, now); err != nil {
		return err
	}
	err = tx.QueryRowContext(ctx, `INSERT INTO replicas (version, started_at) VALUES (?, ?) RETURNING id, epoch`,
		p.config.version, now).Scan(&p.replica, &p.epoch)
	if err != nil {
		return fmt.Errorf("adding a replica: %w", err)
	}
	if _, err := execCount(ctx, tx, "adding a replica",
		`INSERT INTO ledger_commits (replica, seq) VALUES (?, 0)`, p.replica); err != nil {
		return err
	}
	if _, err := execCount(ctx, tx, "deleting old replicas", `
		WITH old AS (DELETE FROM ledger_commits c USING replicas r
			WHERE r.id = c.replica AND r.closed_at < ? RETURNING c.replica)
		SELECT 1 FROM old`, now-dayMS); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	p.writer = postgresLedger{postgres: p, stmts: postgresLedgerStmts(), committed: map[*requestRow]bool{}}
	return nil
}

// requireOpenReplica is true if this process may write. It keeps others from closing the replica before the
// transaction ends.
const requireOpenReplica = `SELECT id FROM replicas WHERE id = ? AND epoch = ? AND closed_at IS NULL FOR SHARE`

// startTx is called at the start of a write transaction. An audited one runs alone, so that the audit trail has one
// writer.
func (p *postgres) startTx(ctx context.Context, tx *sql.Tx, audited bool) error {
	var id int64
	if err := tx.QueryRowContext(ctx, requireOpenReplica, p.replica, p.epoch).Scan(&id); err != nil {
		if errors.Is(err, sql.ErrNoRows) {
			err = errFenced
		}
		return fmt.Errorf("beginning to write: %w", err)
	}
	if !audited {
		return nil
	}
	if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock(?, ?)`, postgresLockClass+1, p.lockKey); err != nil {
		return fmt.Errorf("waiting for other changes: %w", err)
	}
	return nil
}

// size returns the bytes of the database on the server's disk.
func (p *postgres) size(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, p.store.readDB, "reading the database's size",
		`SELECT pg_database_size(current_database())`)
}

// vacuum rewrites the tables with sealed values, without the values that were overwritten.
func (p *postgres) vacuum(ctx context.Context) error {
	for _, statement := range []string{`VACUUM FULL upstreams`, `VACUUM FULL settings`} {
		if _, err := execCount(ctx, p.store.writeDB, "removing old values", statement); err != nil {
			return err
		}
	}
	return nil
}

// problem returns why no call may be admitted, "" if one may.
func (p *postgres) problem() string {
	if text := p.trouble.Load(); text != nil {
		return *text
	}
	return ""
}

// watch checks the exclusive lock every second until ctx is done, and calls report when its state changes. The lock
// is lost with its connection. It is taken again unless another process has it, or had it meanwhile: then the state
// in memory is out of date.
func (p *postgres) watch(ctx context.Context, report func(problem string)) {
	tick := time.NewTicker(postgresCheckInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var problem *string
		if err := p.checkLock(ctx); ctx.Err() != nil {
			return
		} else if err != nil {
			problem = new("the database is not available")
			if errors.Is(err, errFenced) {
				problem = new(errFenced.Error())
			}
		}
		if old := p.trouble.Swap(problem); (old == nil) != (problem == nil) {
			report(p.problem())
		}
	}
}

// checkLock returns an error if this process does not have the lock and cannot take it.
func (p *postgres) checkLock(ctx context.Context) error {
	if p.lockConn != nil {
		if _, err := p.lockConn.ExecContext(ctx, `SELECT 1`); err == nil {
			return nil
		}
		_ = p.lockConn.Close()
		p.lockConn = nil
	}
	if err := p.takeLock(ctx); err != nil {
		return err
	}
	var id int64
	err := p.lockConn.QueryRowContext(ctx, requireOpenReplica, p.replica, p.epoch).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		err = errFenced
	}
	if err != nil {
		_ = p.lockConn.Close()
		p.lockConn = nil
	}
	return err
}

// A postgresConnector opens connections that take the statements of store*.go.
type postgresConnector struct {
	*pq.Connector
	texts *postgresTexts
}

func newPostgresConnector(c *postgresConfig, u *url.URL, parameters map[string]string) (*postgresConnector, error) {
	config, err := pq.NewConfig(postgresDSN(u))
	if err != nil {
		return nil, errors.New(withoutPassword(u, err))
	}
	if c.password != nil {
		config.Password = c.password()
	}
	config.ConnectTimeout = postgresConnectTimeout
	if config.ApplicationName == "" {
		config.ApplicationName = "llm-proxy"
	}
	runtime := map[string]string{"statement_timeout": strconv.FormatInt(c.timeout.Milliseconds(), 10),
		"idle_in_transaction_session_timeout": strconv.FormatInt(10*c.timeout.Milliseconds(), 10),
		"timezone":                            "UTC", "standard_conforming_strings": "on"}
	maps.Copy(runtime, config.Runtime)
	maps.Copy(runtime, parameters)
	config.Runtime = runtime
	inner, err := pq.NewConnectorConfig(config)
	if err != nil {
		return nil, errors.New(withoutPassword(u, err))
	}
	inner.Dialer(postgresDialer{c.timeout + 5*time.Second})
	return &postgresConnector{inner, &postgresTexts{}}, nil
}

// A postgresDialer dials connections that fail when the server has been silent for longer than any statement may take:
// its machine or the network is gone.
type postgresDialer struct{ silence time.Duration }

func (d postgresDialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

func (d postgresDialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return d.DialContext(ctx, network, address)
}

func (d postgresDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &postgresNetConn{conn, d.silence}, nil
}

type postgresNetConn struct {
	net.Conn
	silence time.Duration
}

func (c *postgresNetConn) Read(b []byte) (int, error) {
	_ = c.SetReadDeadline(time.Now().Add(c.silence))
	return c.Conn.Read(b)
}

func (c *postgresNetConn) Write(b []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(c.silence))
	return c.Conn.Write(b)
}

func (c *postgresConnector) Connect(ctx context.Context) (driver.Conn, error) {
	inner, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	full, ok := inner.(postgresDriverConn)
	if !ok {
		return nil, fmt.Errorf("the driver's connection is a %T", inner)
	}
	return &postgresConn{full, c.texts, map[string]*postgresStmt{}}, nil
}

// A postgresDriverConn is what lib/pq's connections can do.
type postgresDriverConn interface {
	driver.Conn
	driver.ConnPrepareContext
	driver.ConnBeginTx
	driver.ExecerContext
	driver.QueryerContext
	driver.Pinger
	driver.SessionResetter
	driver.Validator
}

// A postgresConn translates and prepares each statement once. Statements are constant, so they are few.
type postgresConn struct {
	postgresDriverConn
	texts *postgresTexts
	stmts map[string]*postgresStmt
}

func (c *postgresConn) prepared(ctx context.Context, query string) (*postgresStmt, error) {
	if st := c.stmts[query]; st != nil {
		return st, nil
	}
	text := c.texts.translate(query)
	inner, err := c.postgresDriverConn.PrepareContext(ctx, text.query)
	if err != nil {
		return nil, err
	}
	full, ok := inner.(postgresDriverStmt)
	if !ok {
		return nil, fmt.Errorf("the driver's statement is a %T", inner)
	}
	st := &postgresStmt{full, text.args}
	c.stmts[query] = st
	return st, nil
}

func (c *postgresConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (
	driver.Result, error) {
	if len(args) == 0 { // it may be several statements
		return c.postgresDriverConn.ExecContext(ctx, query, nil)
	}
	st, err := c.prepared(ctx, query)
	if err != nil {
		return nil, err
	}
	return st.ExecContext(ctx, args)
}

func (c *postgresConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if len(args) == 0 {
		return c.postgresDriverConn.QueryContext(ctx, query, nil)
	}
	st, err := c.prepared(ctx, query)
	if err != nil {
		return nil, err
	}
	return st.QueryContext(ctx, args)
}

// PrepareContext returns a statement that stays prepared when it is closed.
func (c *postgresConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	return c.prepared(ctx, query)
}

func (c *postgresConn) Prepare(query string) (driver.Stmt, error) {
	return c.prepared(context.Background(), query)
}

type postgresDriverStmt interface {
	driver.Stmt
	driver.StmtExecContext
	driver.StmtQueryContext
}

// A postgresStmt is a prepared statement of one connection. args are the indexes of the arguments that it uses.
type postgresStmt struct {
	postgresDriverStmt
	args []int
}

func (st *postgresStmt) Close() error  { return nil }
func (st *postgresStmt) NumInput() int { return -1 } // it need not use all

func (st *postgresStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	values, err := st.values(args)
	if err != nil {
		return nil, err
	}
	return st.postgresDriverStmt.ExecContext(ctx, values)
}

func (st *postgresStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	values, err := st.values(args)
	if err != nil {
		return nil, err
	}
	return st.postgresDriverStmt.QueryContext(ctx, values)
}

// values returns the arguments that the statement uses. PostgreSQL takes no text with a zero byte or invalid UTF-8.
func (st *postgresStmt) values(args []driver.NamedValue) ([]driver.NamedValue, error) {
	values := make([]driver.NamedValue, len(st.args))
	for i, from := range st.args {
		if from >= len(args) {
			return nil, fmt.Errorf("a statement needs the argument %d, but has %d", from+1, len(args))
		}
		values[i] = driver.NamedValue{Ordinal: i + 1, Value: args[from].Value}
		if text, ok := values[i].Value.(string); ok {
			values[i].Value = postgresText(text)
		}
	}
	return values, nil
}

// postgresText replaces what PostgreSQL takes in no text.
func postgresText(text string) string {
	if strings.IndexByte(text, 0) >= 0 {
		text = strings.ReplaceAll(text, "\x00", "\ufffd")
	}
	return strings.ToValidUTF8(text, "\ufffd")
}

// A postgresTexts has the translations of statements.
type postgresTexts struct{ byQuery sync.Map }

// A postgresQuery is a statement with $1, $2, … args are the indexes of the arguments that these stand for.
type postgresQuery struct {
	query string
	args  []int
}

func (t *postgresTexts) translate(query string) *postgresQuery {
	if q, ok := t.byQuery.Load(query); ok {
		return q.(*postgresQuery)
	}
	q := translateToPostgres(query)
	t.byQuery.Store(query, q)
	return q
}

// translateToPostgres replaces the parameters ? and ?N of a statement, outside of strings and comments. As in SQLite,
// a ? without a number is the one after the largest so far.
func translateToPostgres(query string) *postgresQuery {
	var out strings.Builder
	q := &postgresQuery{}
	numbers := map[int]int{} // of a parameter, by the index of its argument
	largest := 0
	for i := 0; i < len(query); {
		end := i + 1
		switch rest := query[i:]; {
		case rest[0] == '\'':
			end = i + 2 + strings.IndexByte(rest[1:], '\'')
		case strings.HasPrefix(rest, "--"):
			if end = i + strings.IndexByte(rest, '\n'); end < i {
				end = len(query)
			}
		case rest[0] == '?':
			for end < len(query) && query[end] >= '0' && query[end] <= '9' {
				end++
			}
			n := largest + 1
			if end > i+1 {
				n, _ = strconv.Atoi(query[i+1 : end]) // digits only
			}
			largest = max(largest, n)
			if numbers[n] == 0 {
				q.args = append(q.args, n-1)
				numbers[n] = len(q.args)
			}
			out.WriteString("$" + strconv.Itoa(numbers[n]))
			i = end
			continue
		}
		out.WriteString(query[i:end])
		i = end
	}
	q.query = out.String()
	return q
}
