// This file has the SQL about a database as a whole, for the commands that read one beside a running server,
// copy it, or restore a backup; and the types with which a store uses PostgreSQL.
// It never changes the database that a server has open.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A postgresConfig says how to reach PostgreSQL.
type postgresConfig struct {
	url         secret // with all parameters; it may have a password
	password    secret // nil: the one in the URL, or PGPASSFILE's
	connections int64
	timeout     time.Duration // of one statement
	staleLimit  time.Duration // how long calls are admitted without news of changes
	// replicaTimeout is how long after its last heartbeat a replica counts as dead.
	replicaTimeout time.Duration
	version        string // of this program
	address        string // under which administrators recognize this process
	nonce          string // a random name of this process among the replicas
	previousNonce  string // of the last process with this data directory, which has ended; "" if there was none
	// replicated lets several processes serve with one database at the same time. Without it, this process is alone.
	replicated bool
	clock      func() time.Time              // of this machine; nil: the system's
	inform     func(msg string, args ...any) // writes to the log; nil: nothing does
}

// A backend is what PostgreSQL needs beside statements. It belongs to one store.
type backend struct {
	// version is as schemaVersion, differences as checkSchema.
	version     func(context.Context) (version, supported int, err error)
	differences func(context.Context) ([]string, error)
	// startTx makes a write transaction fail if this process may not write any more. One that is audited runs
	// alone.
	startTx func(ctx context.Context, tx *sql.Tx, audited bool) error
	// announce is called before an audited transaction is committed, with the seq and the MAC of its entry: other
	// replicas learn of the change.
	announce    func(ctx context.Context, tx *sql.Tx, seq int64, mac []byte) error
	disown      func(seq int64) // makes a change that was announced, but failed, that of another replica
	writeLedger func(context.Context, *ledgerWriter, ledgerBatch) error
	// recordedRows returns the number of the outboxMark that the last transaction of a process has.
	recordedRows func(ctx context.Context, outbox string) (int64, error)
	size         func(context.Context) (int64, error)
	vacuum       func(context.Context) error // removes what was overwritten from the tables with sealed values
	problem      func() string               // why no call may be admitted, "" if one may
	slot         func() int64                // of this process, in the ids of its calls; nil: 0
	// lastRequestID returns the highest id, at or above from, of a call with a slot; 0 if there is none.
	lastRequestID func(ctx context.Context, slot, from int64) (int64, error)
	// pendingRecords and deletePending concern one closed replica. 0 is a database that was copied into this one.
	pendingRecords func(ctx context.Context, replica int64, limit int) ([]requestRow, error)
	deletePending  func(ctx context.Context, replica int64) error
	// mergeSlots adds some of the sums of periods that are over to those of slot 0, and returns how many.
	mergeSlots func(ctx context.Context, now int64, limit int) (int64, error)
	// watch keeps this process among the replicas and problem up to date until ctx is done.
	watch func(ctx context.Context, hooks *replicaHooks)
	// recoverClosed calls recoverCalls for each replica that can write nothing any more, but has left something behind.
	// It returns how many calls were lost.
	recoverClosed func(ctx context.Context, recoverCalls recoverFunc) (lost int, err error)
	// awaitRecovery returns when no recoverClosed is under way that began before.
	awaitRecovery func(context.Context) error
	listReplicas  func(context.Context) ([]replicaRow, error)
	// ask asks the other replicas a question. It returns the answers that came within wait, and the ids of replicas
	// that did not answer.
	ask func(ctx context.Context, question, argument string, wait time.Duration) (answers []string, silent []int64,
		err error)
	close func() error

	replica     int64       // the id of this process among those that use the database; 0: it is open for reading
	isLeader    func() bool // it does what only one replica does
	rank        func() replicaRank
	limitNow    func() int64 // by which limits count: the database's time, so that all replicas agree
	clockOffset func() int64
	leases      leaseBackend
	status      func() replicaInfo // without its calls and leases
	started     func()             // lets other processes start; call it once the database has what a server needs
}

// A replicaRank says which of the replicas this process is, in the order of their ids.
type replicaRank struct{ index, count int64 }

// shareOf returns the part of a limit for this process that replicas divide. The parts of all add up to the limit.
func (s *store) shareOf(limit int64) int64 {
	if s.backend == nil {
		return limit
	}
	r := s.backend.rank()
	return limit*(r.index+1)/r.count - limit*r.index/r.count
}

// A recoverFunc records the calls of a closed replica as lost, with a writer of its own, and returns how many.
type recoverFunc func(ctx context.Context, w *ledgerWriter, replica int64) (lost int, err error)

// replicaHooks are what a backend with replicas calls of the rest of the program.
type replicaHooks struct {
	report func(problem string) // backend.problem has changed
	fenced func()               // this process can write nothing any more
	// apply puts the changes of other replicas in force, and those of this one again. Each is complete, or has an
	// effect that cannot be wrong, when it returns; after an error it is called with the same changes again.
	apply        func(context.Context, []auditChange) error
	recall       func(account string)        // returns what is not used of a limit's account: others need it
	mergeHealth  func([]healthRow)           // the stored health of upstreams; those that are missing are ready
	recoverCalls func(context.Context) error // of closed replicas
	describe     func(*replicaInfo)          // adds its calls and leases
	answer       func(ctx context.Context, question, argument string) (string, error)
	warn         func(msg string, args ...any) // as of a slog.Logger
}

// An auditChange is an entry of the audit trail, as far as other replicas need it.
type auditChange struct {
	seq, at                int64
	action, object, detail string
	own                    bool // made by this process, which has put it in force already
}

// A replicaInfo is what a replica says of itself with its heartbeat.
type replicaInfo struct {
	Calls    int64 `json:"calls"`     // running
	Leases   int64 `json:"leases"`    // of limits
	LagMS    int64 `json:"lag_ms"`    // since it last asked for changes
	OffsetMS int64 `json:"offset_ms"` // of the database's clock from its own
	Leader   bool  `json:"leader"`
}

// A replicaRow is a replica whose slot is taken. Times are unix milliseconds.
type replicaRow struct {
	id, slot, startedAt int64
	version, address    string
	closedAt            *int64
	beatAt, now         int64 // by the database's clock
	info                string
}

// clockOffset returns how many milliseconds the database's clock is ahead of this machine's. With SQLite there is one
// clock.
func (s *store) clockOffset() int64 {
	if s.backend == nil {
		return 0
	}
	return s.backend.clockOffset()
}

// isLeader reports whether this process does what only one of several replicas does.
func (s *store) isLeader() bool { return s.backend == nil || s.backend.isLeader() }

func isPostgresURL(text string) bool {
	return strings.HasPrefix(text, "postgres:") || strings.HasPrefix(text, "postgresql:")
}

// checkDatabasePassword checks a password for PostgreSQL.
func checkDatabasePassword(text string) error {
	if text == "" || strings.ContainsRune(text, 0) {
		return errors.New("is empty, or has a zero byte")
	}
	return nil
}

// parseDatabaseURL returns the database file that DATABASE_URL names.
func parseDatabaseURL(s string) (string, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	switch {
	case !ok || scheme != "sqlite" || strings.TrimPrefix(rest, "//") == "":
		return "", errors.New("must be sqlite:FILE or postgres://USER@HOST/NAME")
	case strings.Contains(rest, ":memory:") || strings.Contains(rest, "?"):
		return "", errors.New("must name a file only: a database in memory and parameters after ? are not supported")
	}
	return filepath.Abs(strings.TrimPrefix(rest, "//"))
}

// openReadOnly opens a database that another process may be writing to. Every write through the returned
// store fails. immutable promises that nobody writes to the file: then it is not locked, and no file is
// created beside it.
func openReadOnly(file string, immutable bool) (*store, error) {
	dsn := readOnlyURI(file) + "&_pragma=busy_timeout(5000)"
	if immutable {
		dsn += "&immutable=1"
	}
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, fmt.Errorf("opening database %s: %w", file, err)
	}
	db.SetMaxOpenConns(2)
	return &store{writeDB: db, readDB: db}, nil
}

func readOnlyURI(file string) string {
	return "file:" + (&url.URL{Path: file}).EscapedPath() + "?mode=ro"
}

// A schemaObject is a table, index, view or trigger, as SQLite describes it.
type schemaObject struct{ kind, name, table, definition string }

func listSchema(ctx context.Context, db querier) ([]schemaObject, error) {
	return collect(ctx, db, "reading the schema", func(o *schemaObject) []any {
		return []any{&o.kind, &o.name, &o.table, &o.definition}
	}, `SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema WHERE name NOT GLOB 'sqlite_*' ORDER BY name`)
}

// checkSchema compares the schema of the database with the one that the schema files of its version make, and
// returns the differences. With another schema, statements fail that must succeed: the database would reject
// the rows of calls, and limits would not count those.
func checkSchema(ctx context.Context, db querier, version int) (problems []string, err error) {
	files, err := fs.Glob(schemaFiles, "schema/*.sql")
	if err != nil {
		return nil, fmt.Errorf("listing the schema: %w", err)
	}
	expected := []schemaObject(nil)
	if version == len(files) {
		expected, err = currentSchema()
	} else {
		expected, err = schemaOf(ctx, version)
	}
	if err != nil {
		return nil, err
	}
	found, err := listSchema(ctx, db)
	if err != nil {
		return nil, err
	}
	actual, tables := map[string]schemaObject{}, map[string]bool{}
	for _, o := range found {
		actual[o.name] = o
	}
	for _, o := range expected {
		tables[o.table] = true
		have, ok := actual[o.name]
		if delete(actual, o.name); !ok {
			problems = append(problems, fmt.Sprintf("the %s %s is missing", o.kind, o.name))
		} else if normalizeDefinition(have.definition) != normalizeDefinition(o.definition) {
			problems = append(problems, fmt.Sprintf("the %s %s is different", o.kind, o.name))
		}
	}
	for _, o := range found { // other tables, views and plain indexes change nothing in a database of this program
		if version == 0 && o.kind == "table" {
			problems = append(problems, fmt.Sprintf("it has the table %s", o.name))
		}
		_, added := actual[o.name]
		unique := strings.HasPrefix(normalizeDefinition(o.definition), "CREATEUNIQUE")
		if added && tables[o.table] && (o.kind == "trigger" || unique) {
			problems = append(problems, fmt.Sprintf("the %s %s on %s was added", o.kind, o.name, o.table))
		}
	}
	return problems, nil
}

// schemaDifferences is checkSchema for the whole database.
func (s *store) schemaDifferences(ctx context.Context, version int) ([]string, error) {
	if s.backend != nil {
		return s.backend.differences(ctx)
	}
	return checkSchema(ctx, s.readDB, version)
}

// normalizeDefinition returns a definition without what has no meaning: comments, white space, quotes.
func normalizeDefinition(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		code, _, _ := strings.Cut(line, "--")
		out.WriteString(strings.Join(strings.Fields(strings.ReplaceAll(code, `"`, "")), ""))
	}
	return out.String()
}

// describeSchemaProblems says what differs, and what to do about it.
func describeSchemaProblems(problems []string, version int) error {
	if version == 0 {
		return fmt.Errorf("is not a database of this program: %s; name another file, or move this one away",
			clip(strings.Join(problems, ", "), 300))
	}
	return fmt.Errorf("its schema is not the schema %d of this program (%s): it was changed by hand, or made by a "+
		"development version. Undo a change by hand; otherwise restore a backup, or move the file away to start "+
		"with an empty database", version, clip(strings.Join(problems, ", "), 300))
}

// checkIntegrity runs SQLite's own integrity check and returns the problems that it reports.
func (s *store) checkIntegrity(ctx context.Context) ([]string, error) {
	if s.backend != nil { // PostgreSQL finds damage when it reads a page
		return nil, nil
	}
	lines, err := collect(ctx, s.readDB, "checking integrity", single[string], `PRAGMA integrity_check(20)`)
	return slices.DeleteFunc(lines, func(line string) bool { return line == "ok" }), err
}

// copyTo writes a consistent copy of the database, as of one moment, to a file that is empty. The store must
// be one from openReadOnly: query_only does not allow VACUUM INTO, although that leaves the source alone.
func (s *store) copyTo(ctx context.Context, file string) error {
	return execute(ctx, s.readDB, "copying the database", `VACUUM INTO ?`, file)
}

// rowCounts is how much a database contains.
type rowCounts struct {
	projects, tokens, calls int64
	newestCall              int64 // id of the newest call; 0: none
}

func (s *store) countRows(ctx context.Context) (c rowCounts, err error) {
	err = scanRow(ctx, s.readDB, "counting rows", []any{&c.projects, &c.tokens, &c.calls, &c.newestCall}, `
		SELECT (SELECT count(*) FROM projects WHERE deleted_at IS NULL), (SELECT count(*) FROM tokens),
			(SELECT count(*) FROM requests), (SELECT coalesce(max(id), 0) FROM requests)`)
	return c, err
}

// countRunning counts the calls with an id below before that have not ended.
func (s *store) countRunning(ctx context.Context, before int64) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting running calls",
		`SELECT count(*) FROM running WHERE batch < ?1 AND id < ?1`, before)
}

// attachCurrent attaches the current database, read-only, to the one writing connection of the backup s,
// under the name now, and prepares the comparison: known_projects and known_tokens have the seqs in both
// databases of what both have. made_since has how many requests each token has made since the backup: calls
// that ended, and those that run in either database, which is where a program may have died.
func (s *store) attachCurrent(ctx context.Context, file string) error {
	err := execute(ctx, s.writeDB, "opening the current database", `ATTACH ? AS now`, readOnlyURI(file))
	if err != nil {
		return err
	}
	_, supported, err := s.schemaVersion(ctx)
	if err != nil {
		return err
	}
	version, err := queryValue[int](ctx, s.writeDB, "reading its schema version", `PRAGMA now.user_version`)
	if err != nil {
		return err
	}
	if version < supported {
		return fmt.Errorf("it has schema %d of an earlier version; start this version on it once, which migrates it "+
			"to schema %d, then repeat", version, supported)
	}
	_, err = execEach(ctx, s.writeDB, "comparing with the current database", []string{`
		CREATE TEMP TABLE known_projects AS
		SELECT 0 AS now_seq, 0 AS seq
		UNION ALL SELECT c.seq, b.seq FROM main.projects b JOIN now.projects c ON c.id = b.id`, `
		CREATE UNIQUE INDEX temp.known_projects_seq ON known_projects (now_seq)`, `
		CREATE TEMP TABLE known_tokens AS
		SELECT 0 AS now_seq, 0 AS seq
		UNION ALL SELECT c.seq, b.seq FROM main.tokens b JOIN now.tokens c ON c.id = b.id`, `
		CREATE UNIQUE INDEX temp.known_tokens_seq ON known_tokens (now_seq)`, `
		CREATE TEMP TABLE made_since AS
		SELECT b.id AS id, c.request_count + coalesce(theirs.n, 0) - b.request_count - coalesce(ours.n, 0) AS n
		FROM main.tokens b JOIN now.tokens c ON c.id = b.id
		LEFT JOIN (SELECT token, count(*) AS n FROM main.running GROUP BY token) ours ON ours.token = b.seq
		LEFT JOIN (SELECT token, count(*) AS n FROM now.running GROUP BY token) theirs ON theirs.token = c.seq
		WHERE c.request_count + coalesce(theirs.n, 0) > b.request_count + coalesce(ours.n, 0)`,
	})
	return err
}

// A restorePair is a row of the backup, and the same row as it is in the current database, of which only those
// columns are read that grant something.
type restorePair[T any] struct{ backup, current T }

// comparePairs runs a query that returns pairs of rows. It leaves out foreign rows of the backup: those are refused,
// and writing them would bind them.
func comparePairs[T any, P interface {
	*T
	grantingRow
}](ctx context.Context, s *store, doing string, columns func(*restorePair[T]) []any, query string,
) ([]restorePair[T], error) {
	all, err := collect(ctx, s.writeDB, doing, columns, query)
	return slices.DeleteFunc(all, func(p restorePair[T]) bool {
		return s.checkBinding(ctx, s.writeDB, P(&p.backup)) != nil
	}), err
}

// differingTokens returns the tokens of the backup that are not revoked, and that grant something else in the
// current database, after attachCurrent.
func (s *store) differingTokens(ctx context.Context) ([]restorePair[tokenRow], error) {
	return comparePairs(ctx, s, "comparing tokens", func(p *restorePair[tokenRow]) []any {
		c := &p.current
		return append(p.backup.columns(), &c.hash, &c.oldHash, &c.oldHashUntil, &c.expiresAt, &c.idleExpiry,
			&c.revokedAt, &c.maxRequests, &c.policy)
	}, `
		SELECT b.*, c.hash, c.old_hash, c.old_hash_until, c.expires_at, c.idle_expiry, c.revoked_at, c.max_requests,
			c.policy
		FROM (`+selectTokens+`) b JOIN now.tokens c ON c.id = b.id
		WHERE b.revoked_at IS NULL AND (c.revoked_at IS NOT NULL OR c.hash <> b.hash OR c.old_hash IS NOT b.old_hash
			OR c.old_hash_until IS NOT b.old_hash_until OR c.expires_at IS NOT b.expires_at
			OR c.idle_expiry IS NOT b.idle_expiry OR c.max_requests IS NOT b.max_requests OR c.policy <> b.policy)
		ORDER BY b.seq`)
}

// differingManagementKeys is differingTokens for management keys.
func (s *store) differingManagementKeys(ctx context.Context) ([]restorePair[managementKeyRow], error) {
	return comparePairs(ctx, s, "comparing management keys", func(p *restorePair[managementKeyRow]) []any {
		return append(p.backup.columns(), &p.current.role, &p.current.expiresAt, &p.current.revokedAt)
	}, `
		SELECT b.*, c.role, c.expires_at, c.revoked_at
		FROM (`+selectManagementKeys+`) b JOIN now.management_keys c ON c.id = b.id
		WHERE b.revoked_at IS NULL
			AND (c.revoked_at IS NOT NULL OR c.role <> b.role OR c.expires_at IS NOT b.expires_at)
		ORDER BY b.seq`)
}

// differingProjects is differingTokens for projects that are not deleted in the backup.
func (s *store) differingProjects(ctx context.Context) ([]restorePair[projectRow], error) {
	return comparePairs(ctx, s, "comparing projects", func(p *restorePair[projectRow]) []any {
		return append(p.backup.columns(), &p.current.active, &p.current.policy, &p.current.deletedAt)
	}, `
		SELECT b.*, c.is_active, c.policy, c.deleted_at
		FROM (`+selectProjects+`WHERE deleted_at IS NULL) b JOIN now.projects c ON c.id = b.id
		WHERE c.is_active <> b.is_active OR c.policy <> b.policy OR c.deleted_at IS NOT NULL ORDER BY b.seq`)
}

// upstreamPairs returns the upstreams of the backup that are not deleted there, and that the current database
// has, after attachCurrent.
func (s *store) upstreamPairs(ctx context.Context) ([]restorePair[upstreamRow], error) {
	return comparePairs(ctx, s, "comparing upstreams", func(p *restorePair[upstreamRow]) []any {
		c := &p.current
		return append(p.backup.columns(), &c.baseURL, &c.sealedKey, &c.keyHint, &c.organization, &c.openaiProject,
			&c.models, &c.settings, &c.active, &c.deletedAt, &c.sharedWith)
	}, `
		SELECT b.*, c.base_url, c.sealed_key, c.key_hint, c.organization, c.openai_project, c.models, c.settings,
			c.is_active, c.deleted_at, (SELECT json_group_array(o.id) FROM now.upstream_shares s
				JOIN now.projects o ON o.seq = s.project WHERE s.upstream = c.seq AND o.deleted_at IS NULL)
		FROM (`+selectUpstreams+`WHERE deleted_at IS NULL) b JOIN now.upstreams c ON c.id = b.id ORDER BY b.seq`)
}

// A restoreCount is what else differs between the backup and the current database, after attachCurrent.
type restoreCount struct {
	requestCounts int64 // valid tokens that have made more requests than the backup has counted
	limitUse      int64 // tokens with more recorded use of their limits than in the backup
	createdSince  int64 // valid tokens that the backup does not have
	prices        int64 // prices that were set, changed or deleted since
}

func (s *store) countRestored(ctx context.Context) (c restoreCount, err error) {
	into := []any{&c.requestCounts, &c.limitUse, &c.createdSince, &c.prices}
	err = scanRow(ctx, s.writeDB, "comparing with the current database", into, `
		SELECT (SELECT count(*) FROM temp.made_since m JOIN main.tokens b ON b.id = m.id
				JOIN now.tokens c ON c.id = m.id WHERE b.revoked_at IS NULL AND c.revoked_at IS NULL),
			(SELECT count(DISTINCT n.token) FROM now.usage_sums n JOIN temp.known_tokens k ON k.now_seq = n.token
				LEFT JOIN main.usage_sums m ON m.grain = n.grain AND m.token = k.seq AND m.at = n.at
					AND m.project = (SELECT p.seq FROM temp.known_projects p WHERE p.now_seq = n.project)
					AND m.model = '' AND m.endpoint = '' AND m.outcome = '' AND m.asked = ''
				WHERE n.grain = 'token' AND n.token <> 0 AND n.calls > coalesce(m.calls, 0)),
			(SELECT count(*) FROM now.tokens c
				WHERE c.revoked_at IS NULL AND c.id NOT IN (SELECT id FROM main.tokens)),
			(SELECT count(*) FROM (SELECT * FROM (`+comparedPrices+`main.prices EXCEPT `+comparedPrices+`now.prices)
				UNION SELECT * FROM (`+comparedPrices+`now.prices EXCEPT `+comparedPrices+`main.prices)))`)
	return c, err
}

const comparedPrices = `SELECT match, valid_from, price FROM `

// A narrowing is the rows of a backup to be written with fewer rights.
type narrowing struct {
	at        int64 // when it is restored
	tokens    []tokenRow
	keys      []managementKeyRow
	projects  []projectRow
	upstreams []upstreamRow
}

// applyNarrowing writes the rows of n, and what tokens and projects have used since the backup, after
// attachCurrent.
func (s *store) applyNarrowing(ctx context.Context, origin auditOrigin, event auditEvent, n *narrowing) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		if err := s.rebind(ctx, tx); err != nil {
			return event, err
		}
		for i := range n.tokens {
			if err := n.tokens[i].save(ctx, tx); err != nil {
				return event, fmt.Errorf("writing token %s: %w", n.tokens[i].id, err)
			}
		}
		for i := range n.keys {
			if err := n.keys[i].save(ctx, tx); err != nil {
				return event, fmt.Errorf("writing key %s: %w", n.keys[i].id, err)
			}
		}
		for i := range n.projects {
			if err := n.projects[i].save(ctx, tx); err != nil {
				return event, fmt.Errorf("writing project %s: %w", n.projects[i].id, err)
			}
		}
		for i := range n.upstreams {
			if err := n.upstreams[i].save(ctx, tx, origin.at); err != nil {
				return event, fmt.Errorf("writing upstream %s: %w", n.upstreams[i].id, err)
			}
		}
		_, err := execEach(ctx, tx, "writing what was used since", usedSince())
		return event, err
	})
}

// largerSums sets each sum of a row of usage_sums or attribution_sums to the larger one of two.
const largerSums = `calls = max(calls, excluded.calls), input_tokens = max(input_tokens, excluded.input_tokens),
			cached_tokens = max(cached_tokens, excluded.cached_tokens),
			output_tokens = max(output_tokens, excluded.output_tokens),
			reasoning_tokens = max(reasoning_tokens, excluded.reasoning_tokens), cost = max(cost, excluded.cost),
			unpriced_calls = max(unpriced_calls, excluded.unpriced_calls),
			estimated_calls = max(estimated_calls, excluded.estimated_calls),
			would_refuse = max(would_refuse, excluded.would_refuse), total_us = max(total_us, excluded.total_us),
			cache_hits = max(cache_hits, excluded.cache_hits), saved = max(saved, excluded.saved),
			saved_us = max(saved_us, excluded.saved_us), prompt_saved = max(prompt_saved, excluded.prompt_saved),
			client_retries = max(client_retries, excluded.client_retries)`

// usedSince returns the statements that give tokens and projects the use that the current database has on
// record, so that no limit begins again. The calls themselves stay in the current database. Pending records
// follow: a call that has ended since is in the sums, and one that was running when the current program died
// is still to be recorded as lost. Sums only grow, so the larger one of each pair has the calls of the other.
func usedSince() []string {
	const notEnded = `NOT EXISTS (SELECT 1 FROM now.requests r WHERE r.id = c.value ->> 0)`
	return []string{`
		UPDATE main.begun SET calls = (SELECT json_group_array(json(c.value)) FROM json_each(calls) c WHERE ` +
		notEnded + `)`,
		`DELETE FROM main.begun WHERE calls = '[]'`, `
		INSERT INTO main.begun (batch, calls)
		SELECT b.batch, json_group_array(json(c.value)) FROM now.begun b, json_each(b.calls) c
		WHERE ` + notEnded + ` AND b.batch NOT IN (SELECT batch FROM main.begun)
			AND EXISTS (SELECT 1 FROM temp.known_tokens k WHERE k.now_seq = c.value ->> 2 AND k.seq = k.now_seq)
		GROUP BY b.batch`, `
		UPDATE main.tokens AS b SET request_count = u.n
		FROM (SELECT k.seq AS seq, c.request_count + coalesce(theirs.n, 0) - coalesce(ours.n, 0) AS n
			FROM temp.known_tokens k JOIN now.tokens c ON c.seq = k.now_seq
			LEFT JOIN (SELECT token, count(*) AS n FROM now.running GROUP BY token) theirs ON theirs.token = c.seq
			LEFT JOIN (SELECT token, count(*) AS n FROM main.running GROUP BY token) ours ON ours.token = k.seq) u
		WHERE u.seq = b.seq AND u.n > b.request_count`, `
		INSERT INTO main.usage_sums (grain, project, token, at, model, endpoint, outcome, asked, service_tier,
			` + sumColumns + `)
		SELECT n.grain, p.seq, t.seq, n.at, n.model, n.endpoint, n.outcome, n.asked, n.service_tier,
			` + sumColumns + `
		FROM now.usage_sums n JOIN temp.known_projects p ON p.now_seq = n.project
			JOIN temp.known_tokens t ON t.now_seq = n.token
		WHERE NOT EXISTS (SELECT 1 FROM main.usage_sums m
			WHERE m.grain = n.grain AND m.project = p.seq AND m.token = t.seq AND m.at = n.at AND m.model = n.model
				AND m.endpoint = n.endpoint AND m.outcome = n.outcome AND m.asked = n.asked
				AND m.service_tier = n.service_tier AND m.calls >= n.calls
				AND m.input_tokens >= n.input_tokens AND m.output_tokens >= n.output_tokens AND m.cost >= n.cost)
		ON CONFLICT DO UPDATE SET ` + largerSums, `
		INSERT INTO main.project_hours (project, at, calls, input_tokens, output_tokens, cost, unpriced_calls,
			caller_errors, policy_errors, provider_errors, proxy_errors)
		SELECT p.seq, n.at, n.calls, n.input_tokens, n.output_tokens, n.cost, n.unpriced_calls, n.caller_errors,
			n.policy_errors, n.provider_errors, n.proxy_errors
		FROM now.project_hours n JOIN temp.known_projects p ON p.now_seq = n.project WHERE true
		ON CONFLICT DO UPDATE SET calls = max(calls, excluded.calls),
			input_tokens = max(input_tokens, excluded.input_tokens),
			output_tokens = max(output_tokens, excluded.output_tokens), cost = max(cost, excluded.cost),
			unpriced_calls = max(unpriced_calls, excluded.unpriced_calls),
			caller_errors = max(caller_errors, excluded.caller_errors),
			policy_errors = max(policy_errors, excluded.policy_errors),
			provider_errors = max(provider_errors, excluded.provider_errors),
			proxy_errors = max(proxy_errors, excluded.proxy_errors)`, `
		INSERT INTO main.project_latency (project, at, bucket, first_bytes, answers)
		SELECT p.seq, n.at, n.bucket, n.first_bytes, n.answers
		FROM now.project_latency n JOIN temp.known_projects p ON p.now_seq = n.project WHERE true
		ON CONFLICT DO UPDATE SET first_bytes = max(first_bytes, excluded.first_bytes),
			answers = max(answers, excluded.answers)`, attributedSince, valuesUsedSince}
}

// valuesUsedSince is the statement of usedSince for the values of limits with for_each.
const valuesUsedSince = `
	INSERT INTO main.limit_values (project, token, rule, value, window_start, window_end, used)
	SELECT p.seq, t.seq, n.rule, n.value, n.window_start, n.window_end, n.used
	FROM now.limit_values n JOIN temp.known_projects p ON p.now_seq = n.project
		JOIN temp.known_tokens t ON t.now_seq = n.token WHERE true
	ON CONFLICT DO UPDATE SET used = max(used, excluded.used)`

// attributedSince is the statement of usedSince for the sums of attributes.
const attributedSince = `
	INSERT INTO main.attribution_sums (project, attribute, at, value, token, model, endpoint, outcome, asked,
		` + sumColumns + `)
	SELECT p.seq, n.attribute, n.at, n.value, t.seq, n.model, n.endpoint, n.outcome, n.asked, ` + sumColumns + `
	FROM now.attribution_sums n JOIN temp.known_projects p ON p.now_seq = n.project
		JOIN temp.known_tokens t ON t.now_seq = n.token WHERE true
	ON CONFLICT DO UPDATE SET ` + largerSums

// revokeAll revokes every token and every management key.
func (s *store) revokeAll(ctx context.Context, origin auditOrigin, event auditEvent) error {
	return s.execAudited(ctx, origin, event, []string{
		`UPDATE tokens SET revoked_at = ?1, version = version + 1, updated_at = ?1, mac = x'' WHERE revoked_at IS NULL`,
		`UPDATE management_keys SET revoked_at = ?1, version = version + 1, updated_at = ?1, mac = x''
		WHERE revoked_at IS NULL`,
	})
}

// execAudited binds the rows of a restored backup again, and runs statements that use the time as ?1, in one audited
// transaction.
func (s *store) execAudited(ctx context.Context, origin auditOrigin, event auditEvent, statements []string) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		if err := s.rebind(ctx, tx); err != nil {
			return event, err
		}
		_, err := execEach(ctx, tx, "revoking", statements, origin.at)
		return event, err
	})
}

// attachedAuditHead returns where the audit trail of the current database ends, after attachCurrent; "" if
// that cannot be read.
func (s *store) attachedAuditHead(ctx context.Context) string {
	stored, err := queryValue[string](ctx, s.writeDB, "reading the audit head",
		`SELECT value FROM now.settings WHERE name = 'audit_head'`)
	if err != nil {
		return "" // no database is attached, or it is older than the trail
	}
	return stored[:max(strings.LastIndexByte(stored, ':'), 0)]
}

// usedBefore reports whether a database without a key check has rows, and whether it has credentials. Credentials
// cannot be made without an encryption key, so in that case the key check was removed.
func (s *store) usedBefore(ctx context.Context) (rows, credentials bool, err error) {
	err = scanRow(ctx, s.readDB, "looking for rows", []any{&rows, &credentials}, `
		SELECT EXISTS (SELECT 1 FROM projects), EXISTS (SELECT 1 FROM tokens)
			OR EXISTS (SELECT 1 FROM management_keys) OR EXISTS (SELECT 1 FROM upstreams)
			OR EXISTS (SELECT 1 FROM sessions) OR EXISTS (SELECT 1 FROM audit)`)
	return rows || credentials, credentials, err
}

// dropCacheFrom deletes the cached answers from a new backup, which no program has open: they are large, and nobody
// misses them.
func dropCacheFrom(ctx context.Context, file string) error {
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: file}).EscapedPath()+"?_pragma=journal_mode(delete)")
	if err != nil {
		return fmt.Errorf("opening the backup: %w", err)
	}
	db.SetMaxOpenConns(1)
	st := &store{writeDB: db, readDB: db}
	tables, err := queryValue[int](ctx, db, "looking for the cache",
		`SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'cache'`)
	if err == nil && tables > 0 { // otherwise the server is of an earlier version
		err = st.clearCache(ctx)
	}
	return errors.Join(err, db.Close())
}

// clearCache deletes every cached answer of a database that no server has open, and leaves nothing of them in its
// file: a backup has no cache, and a restored database starts with an empty one.
func (s *store) clearCache(ctx context.Context) error {
	if _, err := queryValue[int64](ctx, s.writeDB, "looking for cached answers",
		`SELECT id FROM cache WHERE project > 0 LIMIT 1`); errors.Is(err, errNotFound) {
		return nil
	}
	if err := execute(ctx, s.writeDB, "deleting the cache", `DELETE FROM cache`); err != nil {
		return err
	}
	return execute(ctx, s.writeDB, "compacting the database", `VACUUM`)
}
