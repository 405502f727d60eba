//go:build postgres

// This file is how the program uses PostgreSQL: it checks DATABASE_URL, connects, translates the statements of
// store*.go once, and brings the schema up to date. The password is used here and nowhere else, and no error has it.
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
	lockDB   *sql.DB // for advisory locks
	lockKey  int32   // names the schema in advisory locks
	replica  int64   // 0: opened for reading
	epoch    int64
	slot     atomic.Int64 // in the ids of calls
	writer   postgresLedger
	leases   postgresLeases

	cluster *cluster
	started func() // lets other processes start
	// recovering lets others record the calls of closed replicas. Until this process has recorded what its predecessor
	// has left in a file, they would record these calls as lost.
	recovering func()
	listen     func(channel string) (notifications <-chan string, stop func())
}

// openPostgres connects. With serve, it migrates the schema and joins the replicas; otherwise every write fails.
func openPostgres(ctx context.Context, c *postgresConfig, serve bool) (*store, error) {
	p, err := newPostgres(ctx, c, serve)
	if err != nil {
		return nil, err
	}
	return p.store, nil
}

// newPostgres is openPostgres.
func newPostgres(ctx context.Context, c *postgresConfig, serve bool) (_ *postgres, err error) {
	u, err := url.Parse(c.url())
	if err != nil {
		return nil, errors.New("DATABASE_URL is not a URL")
	}
	p := &postgres{config: c, name: u.Redacted(), started: func() {}, recovering: func() {},
		store: &store{reports: make(chan struct{}, maxReports)}}
	p.cluster = newCluster(p)
	defer func() {
		if err != nil {
			p.started()
			p.recovering()
			p.cluster.dropLocks()
			err = fmt.Errorf("database %s: %w", p.name, err)
			for _, db := range []*sql.DB{p.store.readDB, p.store.writeDB, p.ledgerDB, p.lockDB, p.leases.db} {
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
		p.listen = connector.listen
		return openPool(connector, n), nil
	}
	readOnly := map[string]string{"default_transaction_read_only": "on"}
	if p.store.readDB, err = open(max(int(c.connections)-6, 2), readOnly); err != nil {
		return nil, err
	}
	p.store.backend = p.backend()
	if !serve {
		p.store.writeDB = p.store.readDB
		return p, p.checkServer(ctx)
	}
	for _, db := range []**sql.DB{&p.store.writeDB, &p.ledgerDB, &p.leases.db} {
		if *db, err = open(1, nil); err != nil {
			return nil, err
		}
	}
	// If this machine vanishes, the server notices within 20 s and releases the lock.
	keepalive := map[string]string{"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "5",
		"tcp_keepalives_count": "3"}
	if p.lockDB, err = open(lockConnections, keepalive); err != nil {
		return nil, err
	}
	if err = p.checkServer(ctx); err != nil {
		return nil, err
	}
	return p, p.join(ctx, u)
}

// openPool returns a pool of n connections.
func openPool(connector *postgresConnector, n int) *sql.DB {
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	return db
}

func (p *postgres) backend() *backend {
	return &backend{
		version: p.version, differences: p.differences, startTx: p.startTx, writeLedger: p.writer.write,
		recordedRows: p.recordedRows, size: p.size, vacuum: p.vacuum, problem: p.cluster.problem,
		watch: p.cluster.watch, close: p.close,
		slot: p.slot.Load, lastRequestID: p.lastRequestID, recoverClosed: p.recoverClosed,
		awaitRecovery:  p.cluster.awaitRecovery,
		pendingRecords: p.pendingRecords, deletePending: p.deletePending, mergeSlots: p.mergeSlots,
		listReplicas: p.listReplicas, ask: p.cluster.ask, announce: p.announce,
		disown: p.cluster.disown, isLeader: p.cluster.isLeader,
		rank:     func() replicaRank { return *p.cluster.rank.Load() },
		limitNow: p.cluster.limitNow, clockOffset: p.cluster.offset.Load, status: p.cluster.status,
		started: func() { p.started() }, leases: p.leases.backend(p),
	}
}

func (p *postgres) close() error {
	if p.lockDB == nil {
		return nil
	}
	p.started()
	p.recovering()
	err := p.leave()
	p.cluster.dropLocks()
	return errors.Join(err, p.leases.db.Close(), p.ledgerDB.Close(), p.lockDB.Close()) // the server releases the locks
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

// size returns the bytes of the database on the server's disk.
func (p *postgres) size(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, p.store.readDB, "reading the database's size",
		`SELECT pg_database_size(current_database())`)
}

// vacuum rewrites the tables with sealed values, without the values that were overwritten.
func (p *postgres) vacuum(ctx context.Context) error {
	_, err := execEach(ctx, p.store.writeDB, "removing old values",
		[]string{`VACUUM FULL upstreams`, `VACUUM FULL settings`})
	return err
}

// A postgresConnector opens connections that take the statements of store*.go.
type postgresConnector struct {
	*pq.Connector
	texts *postgresTexts
	// listen returns what is sent to a channel from now on, and "" after a lost connection: what was sent meanwhile
	// is not known.
	listen func(channel string) (notifications <-chan string, stop func())
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
	runtime := map[string]string{statementTimeout: strconv.FormatInt(c.timeout.Milliseconds(), 10),
		"idle_in_transaction_session_timeout": strconv.FormatInt(c.maxIdleTx().Milliseconds(), 10),
		"timezone":                            "UTC", "standard_conforming_strings": "on"}
	maps.Copy(runtime, config.Runtime)
	maps.Copy(runtime, parameters)
	config.Runtime = runtime
	inner, err := pq.NewConnectorConfig(config)
	if err != nil {
		return nil, errors.New(withoutPassword(u, err))
	}
	silence := c.timeout + 5*time.Second
	if runtime[statementTimeout] == "0" {
		silence = 0
	}
	inner.Dialer(postgresDialer{silence})
	listening := *u
	if config.Password != "" {
		listening.User = url.UserPassword(config.User, config.Password)
	}
	dsn := postgresDSN(&listening)
	return &postgresConnector{inner, &postgresTexts{}, func(channel string) (<-chan string, func()) {
		return listenPostgres(dsn, channel)
	}}, nil
}

// maxIdleTx is how long a transaction may do nothing. One of a replica that was stopped must not keep its row from
// being closed.
func (c *postgresConfig) maxIdleTx() time.Duration {
	if c.replicated {
		return c.replicaTimeout
	}
	return 10 * c.timeout
}

// listenPostgres is postgresConnector.listen. An error says only that changes are found later, by looking for them.
func listenPostgres(dsn, channel string) (<-chan string, func()) {
	l := pq.NewListener(dsn, 200*time.Millisecond, 5*time.Second, nil)
	out, done := make(chan string, 64), make(chan struct{})
	go func() { // ends with l, in stop
		defer close(done)
		_ = l.Listen(channel) // waits for the first connection, and is repeated for each later one
		for n := range l.Notify {
			text := ""
			if n != nil {
				text = n.Extra
			}
			select {
			case out <- text:
			default: // nobody has time; the next look finds everything
			}
		}
	}()
	return out, func() { _ = l.Close(); <-done }
}

// discardConn closes the connection itself, which Close would return to its pool: with its locks.
func discardConn(conn *sql.Conn) {
	_ = conn.Raw(func(any) error { return driver.ErrBadConn })
	_ = conn.Close()
}

// statementTimeout is how long a statement may take, as a parameter of a connection; 0: as long as it needs.
const statementTimeout = "statement_timeout"

// A postgresDialer dials connections that fail when the server has been silent for longer than any statement may take:
// its machine or the network is gone. Without such a bound (0), TCP's keepalives notice that.
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
	if d.silence == 0 {
		return conn, nil
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
	return &postgresConn{postgresDriverConn: full, texts: c.texts, stmts: map[string]*postgresStmt{}}, nil
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
	stale bool // a newer version has migrated the schema, and prepared statements do not suit it any more
}

// IsValid is false if the pool must open another connection.
func (c *postgresConn) IsValid() bool { return !c.stale && c.postgresDriverConn.IsValid() }

// check notices that a statement has to be prepared again.
func (c *postgresConn) check(err error) error {
	c.stale = c.stale || err != nil && sqlState(err) == "0A000" // cached plan must not change result type
	return err
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
	st := &postgresStmt{full, c, text.args}
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
	conn *postgresConn
	args []int
}

func (st *postgresStmt) Close() error  { return nil }
func (st *postgresStmt) NumInput() int { return -1 } // it need not use all

func (st *postgresStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	values, err := st.values(args)
	if err != nil {
		return nil, err
	}
	result, err := st.postgresDriverStmt.ExecContext(ctx, values)
	return result, st.conn.check(err)
}

func (st *postgresStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	values, err := st.values(args)
	if err != nil {
		return nil, err
	}
	rows, err := st.postgresDriverStmt.QueryContext(ctx, values)
	return rows, st.conn.check(err)
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
