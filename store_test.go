// Tests of the store: no statement scans a growing table, rows of calls never change, and the hours of projects
// agree with the calls. Benchmarks at the promised sizes: a million tokens, and the sums that ten million calls
// leave. Those seed a database for minutes, so only -bench runs them:
//
//	go test -run '^$' -bench Scale -benchtime 20x -timeout 60m .
package main

import (
	"context"
	"database/sql"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A scaleTest is a server on a seeded database.
type scaleTest struct {
	b        *testing.B
	env      map[string]string
	instance *instance
	web      *httptest.Server
	key      secret
	cookie   string // of a session; "" until one begins
}

func newScaleTest(b *testing.B) *scaleTest {
	b.Helper()
	provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, chatResponseBody)
	}))
	b.Cleanup(provider.Close)
	s := &scaleTest{b: b, env: map[string]string{"DATA_DIR": filepath.Join(b.TempDir(), "data"),
		"ALLOW_PRIVATE_UPSTREAMS": "true", "OPENAI_API_URL": provider.URL, "LOG_LEVEL": "warn"}}
	s.open()
	var err error
	if s.key, err = s.instance.operations.createFirstKey(b.Context()); err != nil {
		b.Fatal(err)
	}
	return s
}

// open starts the server and returns how long that took.
func (s *scaleTest) open() time.Duration {
	s.b.Helper()
	cfg, err := loadConfig(func(name string) string { return s.env[name] })
	if err != nil {
		s.b.Fatal(err)
	}
	start := time.Now()
	log := newLogger(s.b.Output(), cfg.logLevel, true)
	if s.instance, err = openInstance(context.Background(), cfg, log, nil); err != nil {
		s.b.Fatal(err)
	}
	s.web = httptest.NewServer(s.instance.server.routes())
	return time.Since(start)
}

func (s *scaleTest) close() {
	s.web.Close()
	if err := s.instance.close(); err != nil {
		s.b.Error(err)
	}
}

// seed runs statements in one transaction, with a page cache that fits them.
func (s *scaleTest) seed(statements ...string) {
	s.b.Helper()
	ctx := s.b.Context()
	if _, err := s.instance.store.writeDB.ExecContext(ctx, `PRAGMA cache_size = -400000`); err != nil {
		s.b.Fatal(err)
	}
	err := s.instance.store.withTx(ctx, func(tx *sql.Tx) error {
		for _, text := range statements {
			if _, err := tx.ExecContext(ctx, text); err != nil {
				return fmt.Errorf("%w in %s", err, text)
			}
		}
		return nil
	})
	if err != nil {
		s.b.Fatal(err)
	}
	if _, err := s.instance.store.writeDB.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`); err != nil {
		s.b.Fatal(err)
	}
}

// call sends a request, with the session if key is "", and expects 2xx. It returns how long that took, and the
// answer.
func (s *scaleTest) call(method, path, body, key string) (time.Duration, string) {
	s.b.Helper()
	req, err := http.NewRequestWithContext(s.b.Context(), method, s.web.URL+path, strings.NewReader(body))
	if err != nil {
		s.b.Fatal(err)
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	} else {
		req.Header.Set("Cookie", s.cookie)
	}
	req.Header.Set("Content-Type", "application/json")
	start := time.Now()
	res, err := s.web.Client().Do(req)
	if err != nil {
		s.b.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode > 299 {
		s.b.Fatalf("%s %s: %d %s %v", method, path, res.StatusCode, text, err)
	}
	return time.Since(start), string(text)
}

// reportTimes reports the median and the longest of some times, in milliseconds.
func reportTimes(b *testing.B, name string, times []time.Duration) {
	slices.Sort(times)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(0, "ns/op") // meaningless here: not shown
	b.ReportMetric(ms(times[len(times)/2]), name+"p50-ms")
	b.ReportMetric(ms(times[len(times)-1]), name+"max-ms")
}

// seedProjects makes 50 projects with an upstream each; their seqs are 1 to 50.
func (s *scaleTest) seedProjects() {
	s.b.Helper()
	for i := range 50 {
		name, key := fmt.Sprintf("project %02d", i), newSecret("sk-scale-"+randomBase62(40))
		if _, err := s.instance.operations.createFirstProject(s.b.Context(), name, key); err != nil {
			s.b.Fatal(err)
		}
	}
}

// firstIDs returns the ids of a project and of a token.
func (s *scaleTest) firstIDs() (project, token string) {
	s.b.Helper()
	_, projects := s.call("GET", "/manage/projects?limit=1", "", s.key())
	_, tokens := s.call("GET", "/manage/tokens?limit=1", "", s.key())
	return between(projects, `{"data":[{"id":"`, `"`), between(tokens, `{"data":[{"id":"`, `"`)
}

// BenchmarkScaleTokens has 1,000,000 tokens. It measures a start, the first and later uses of a token, and pages
// of the list.
func BenchmarkScaleTokens(b *testing.B) {
	s := newScaleTest(b)
	s.seedProjects()
	s.seed(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)
		INSERT INTO tokens (id, project, name, hash, expires_at, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), 1 + i % 50, 'seeded ' || hex(randomblob(3)), randomblob(32),
			CASE WHEN i % 10 = 0 THEN 1 END, 1764000000000 + i, 1764000000000 + i FROM n`)
	tokens := s.addTokens(200)
	s.close()

	b.Run("start", func(b *testing.B) {
		var times []time.Duration
		for b.Loop() {
			times = append(times, s.open())
			s.close()
		}
		reportTimes(b, "", times)
	})
	s.open()
	defer s.close()
	b.Run("use", func(b *testing.B) {
		s.call("POST", "/v1/chat/completions", chatBody(), tokens[0]) // opens the connections
		var first, later []time.Duration
		for b.Loop() {
			for _, token := range tokens[1:] {
				d, _ := s.call("POST", "/v1/chat/completions", chatBody(), token)
				first = append(first, d)
				for range 2 {
					d, _ := s.call("POST", "/v1/chat/completions", chatBody(), token)
					later = append(later, d)
				}
			}
			tokens = tokens[:1] // a first use happens once
		}
		reportTimes(b, "first-", first)
		reportTimes(b, "later-", later)
	})
	project, _ := s.firstIDs()
	for _, query := range []string{"limit=100", "limit=500", "project_id=" + project, "name=seeded", "name=seeded+7",
		"name=seeded&project_id=" + project, "active=false"} {
		b.Run("list?"+query, func(b *testing.B) {
			path := "/manage/tokens?" + query
			var times []time.Duration
			for b.Loop() {
				d, page := s.call("GET", path, "", s.key())
				times = append(times, d)
				if next := between(page, `"next":"`, `"`); next != "" {
					path = "/manage/tokens?" + query + "&after=" + next
				}
			}
			reportTimes(b, "", times)
		})
	}
}

// addTokens adds tokens to the project 7 and returns their values.
func (s *scaleTest) addTokens(n int) (values []string) {
	s.b.Helper()
	p, err := s.instance.store.projectBySeq(s.b.Context(), 7)
	if err != nil {
		s.b.Fatal(err)
	}
	for range n {
		value, public := mintCredential(tokenPrefix, "")
		hash, _ := hashCredential(tokenPrefix, value())
		row := tokenRow{id: "tok_" + public, projectID: p.id, name: "used", hash: hash[:], policy: "{}",
			createdAt: 1, updatedAt: 1}
		if err := s.instance.store.addToken(s.b.Context(), systemOrigin(time.Now()), &row); err != nil {
			s.b.Fatal(err)
		}
		values = append(values, value())
	}
	return values
}

// seedUsage makes the sums of more than 10,000,000 calls in the 90 days before last.
func (s *scaleTest) seedUsage(last int64) {
	s.b.Helper()
	const columns = `(grain, token, at, project, model, endpoint, outcome, calls, input_tokens, cached_tokens,
		output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, total_us)`
	const sums = `sum(calls), sum(input_tokens), sum(cached_tokens), sum(output_tokens), sum(reasoning_tokens),
		sum(cost), 0, sum(estimated_calls), sum(total_us)`
	s.seed(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 950)
		INSERT INTO tokens (id, project, name, hash, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), 1 + i % 50, 'seeded ' || i, randomblob(32), 1764000000000 + i,
			1764000000000 + i
		FROM n`,
		// The calls of a cell are its share, rounded up or down at random, so that quiet tokens have gaps.
		fmt.Sprintf(`
		WITH RECURSIVE hours (h) AS (SELECT 0 UNION ALL SELECT h + 1 FROM hours WHERE h < 90 * 24 - 1),
			models (model, share) AS (VALUES ('gpt-4o', 0.2), ('gpt-4o-mini', 0.5), ('gpt-5', 0.2),
				('gpt-5-mini', 0.05), ('text-embedding-3-small', 0.05)),
			cells AS (
				SELECT t.seq AS token, t.project, h, model,
					cast(share * 22000000.0 / 2160 / 1000 * 5 / (1 + 9 * (t.seq %% 100) / 20.0)
						* 1.25 + abs(random() %% 1000000) / 1000000.0 AS INTEGER) AS n
				FROM tokens t CROSS JOIN hours CROSS JOIN models)
		INSERT INTO usage_sums `+columns+`
		SELECT 'hour', token, %d + h * 3600000, project, model, 'POST /v1/chat/completions', 'ok',
			n, n * 900, n * 100, n * 250, n * 40, n * 400000, 0, n / 50, n * 900000 FROM cells WHERE n > 0
		ORDER BY token, h, model`, last-90*dayMS),
		`INSERT INTO usage_sums `+columns+`
		SELECT 'hour', token, at, project, model, endpoint, 'upstream_error', 1, 900, 0, 0, 0, 0, 0, 1, 300000
		FROM usage_sums WHERE grain = 'hour' AND abs(random() % 25) = 0`,
		`INSERT INTO usage_sums `+columns+`
		SELECT 'hour', 0, at, project, model, endpoint, outcome, `+sums+` FROM usage_sums WHERE grain = 'hour'
		GROUP BY at, project, model, endpoint, outcome`,
		`INSERT INTO usage_sums `+columns+`
		SELECT 'day', token, at - at % 86400000, project, model, endpoint, outcome, `+sums+`
		FROM usage_sums WHERE grain = 'hour'
		GROUP BY token, at - at % 86400000, project, model, endpoint, outcome`,
		`INSERT INTO usage_sums `+columns+`
		SELECT 'token', token, at, project, '', '', '', `+sums+`
		FROM usage_sums WHERE grain = 'day' GROUP BY token, at, project`)
}

// logSums logs how many sums there are.
func (s *scaleTest) logSums() {
	s.b.Helper()
	type sums struct {
		grain        string
		singleTokens bool
		rows, calls  int64
	}
	all, err := collect(s.b.Context(), s.instance.store.readDB, "counting sums", func(c *sums) []any {
		return []any{&c.grain, &c.singleTokens, &c.rows, &c.calls}
	}, `SELECT grain, token <> 0, count(*), sum(calls) FROM usage_sums GROUP BY 1, 2`)
	if err != nil {
		s.b.Fatal(err)
	}
	s.b.Logf("sums: %+v", all)
}

// BenchmarkScaleUsage has the sums of more than 10,000,000 calls: 90 days, 50 projects, 1,000 tokens of which a
// few are busy, each with 5 models.
func BenchmarkScaleUsage(b *testing.B) {
	s := newScaleTest(b)
	defer s.close()
	s.seedProjects()
	last := (time.Now().UnixMilli()/dayMS + 1) * dayMS // the end of today
	s.seedUsage(last)
	s.logSums()
	project, token := s.firstIDs()
	from := "from=" + time.UnixMilli(last-90*dayMS).UTC().Format(time.RFC3339)
	for _, query := range []string{
		"",
		"interval=day&group_by=project&" + from,
		"interval=month&group_by=model&" + from,
		"interval=day&group_by=token&project_id=" + project + "&" + from,
		"interval=day&group_by=token&project_id=" + project,
		"interval=total&group_by=token",
		"interval=total&group_by=token&" + from,
		"interval=total&group_by=token,model&" + from,
		"interval=month&group_by=token&" + from,
		"interval=hour&group_by=project,model",
		"interval=hour&group_by=token&project_id=" + project,
		"interval=day&group_by=model&token_id=" + token + "&" + from,
	} {
		b.Run("usage?"+query, func(b *testing.B) {
			var times []time.Duration
			size := 0
			for b.Loop() {
				d, text := s.call("GET", "/manage/usage?"+query, "", s.key())
				times, size = append(times, d), strings.Count(text, `"calls":`)
			}
			reportTimes(b, "", times)
			b.ReportMetric(float64(size), "rows")
		})
	}
}

// seedPages fills the database. Calls are evenly spread over 90 days, and over projects and tokens by a prime
// number.
func (s *scaleTest) seedPages(last int64) {
	s.b.Helper()
	from, start := last-90*dayMS, time.Now()
	s.seedCalls(from, last)
	s.b.Logf("calls after %v", time.Since(start))
	const insertSums = `INSERT INTO usage_sums (grain, project, token, at, model, endpoint, outcome, calls,
		input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, total_us) `
	for _, of := range []struct {
		grain, project string
		steps, length  int64
	}{
		{grain: "hour", project: "0", steps: 90 * 24, length: hourMS},
		{grain: "day", project: "0", steps: 90, length: dayMS},
		{grain: "hour", project: "7", steps: 90 * 24, length: hourMS},
		{grain: "day", project: "7", steps: 90, length: dayMS},
	} {
		s.seed(fmt.Sprintf(insertSums+seriesCTE+`,
			models (model, share) AS (VALUES ('gpt-4o', 4), ('gpt-4o-mini', 10), ('gpt-5', 4), ('gpt-5-mini', 1),
				('text-embedding-3-small', 1))
			SELECT '%s', %s, 0, %d + n.i * %d, model, endpoint, outcome,
				share * %d, share * 900, 0, share * 250, 0, share * 400000, 0, 0, share * 900000
			FROM n CROSS JOIN models CROSS JOIN (SELECT 'ok' AS outcome UNION ALL SELECT 'upstream_error')
			CROSS JOIN (SELECT 'POST /v1/chat/completions' AS endpoint UNION ALL SELECT 'POST /v1/embeddings')`,
			of.steps, of.grain, of.project, from, of.length, of.length/hourMS))
	}
	for _, text := range []string{
		fmt.Sprintf(insertSums+seriesCTE+`
			SELECT 'token', p.seq, 0, %d + i * 86400000, '', '', '', 111, 99900, 0, 27750, 0, 44400000, 0, 0, 1
			FROM projects p CROSS JOIN n`, 90, from),
		fmt.Sprintf(insertSums+seriesCTE+`
			SELECT 'token', t.project, t.seq, %d + i * 86400000, '', '', '', 1, 900, 0, 250, 0, 400000, 0, 0, 1
			FROM (SELECT seq, project FROM tokens LIMIT 20000) t CROSS JOIN n`, 90, from),
		fmt.Sprintf(`INSERT INTO project_hours `+seriesCTE+`
			SELECT p.seq, %d + i * 3600000, 5, 4500, 1250, 2000000, 0, 0, 0, 1, 0
			FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p CROSS JOIN n`, 90*24, from),
		fmt.Sprintf(`INSERT INTO project_latency `+seriesCTE+`,
			buckets (ms) AS (VALUES (250), (400), (630), (1000), (1600), (2500), (4000))
			SELECT p.seq, %d + i * 3600000, ms, i %% 7, i %% 7
			FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p CROSS JOIN n CROSS JOIN buckets`, 90*24, from),
	} {
		s.seed(text)
	}
	s.b.Logf("all after %v", time.Since(start))
}

// seriesCTE is the table n of the numbers i below a number.
const seriesCTE = `WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < %d - 1) `

// seedCalls makes 1,000 projects, 1,000,000 tokens and 10,000,000 calls.
func (s *scaleTest) seedCalls(from, last int64) {
	s.b.Helper()
	s.seed(fmt.Sprintf(`INSERT INTO projects (id, name, created_at, updated_at) `+seriesCTE+`
			SELECT printf('proj_scale%%07d', i), printf('project %%04d', i), 1, 1 FROM n`, 1000))
	s.seed(fmt.Sprintf(`INSERT INTO tokens (id, project, name, hash, expires_at, created_at, updated_at) `+seriesCTE+`
			SELECT printf('tok_scale%%08d', i), 1 + i %% 1000, 'seeded ' || i, randomblob(32), %d + i * 7000,
				1764000000000 + i, 1764000000000 + i
			FROM n`, 1_000_000, last))
	for part := range int64(10) {
		s.seed(fmt.Sprintf(`INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address,
				status, outcome, error_code, usage_source, input_tokens, output_tokens, cost, first_byte_us,
				total_us) `+seriesCTE+`
			SELECT (%d + i * 777) << 21, 1 + i * 7919 %% 1000, 1 + i * 7919 %% 1000000, 0,
				'POST /v1/chat/completions',
				CASE i %% 5 WHEN 0 THEN 'gpt-5' WHEN 1 THEN 'gpt-4o' ELSE 'gpt-4o-mini' END,
				i %% 2, '192.0.2.1', CASE WHEN i %% 50 = 0 THEN 500 ELSE 200 END,
				CASE WHEN i %% 50 = 0 THEN 'upstream_error' ELSE 'ok' END, '', 'exact', 900, 250, 400000, 300000,
				2000000
			FROM n`, 1_000_000, from+part*777_000_000))
	}
}

// signIn signs in to the pages.
func (s *scaleTest) signIn() {
	s.b.Helper()
	client := *s.web.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	form := strings.NewReader(url.Values{"key": {s.key()}}.Encode())
	req, err := http.NewRequestWithContext(s.b.Context(), "POST", s.web.URL+"/admin/sign-in", form)
	if err != nil {
		s.b.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	res, err := client.Do(req)
	if err != nil {
		s.b.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != 303 {
		s.b.Fatal(res.StatusCode)
	}
	s.cookie, _, _ = strings.Cut(res.Header.Get("Set-Cookie"), ";")
}

// BenchmarkScalePages loads each page that shows many calls, signed in.
func BenchmarkScalePages(b *testing.B) {
	s := newScaleTest(b)
	defer s.close()
	last := (time.Now().UnixMilli()/dayMS + 1) * dayMS
	s.seedPages(last)
	s.signIn()
	const project = "&project=proj_scale0000006"
	middle := time.UnixMilli(last - 45*dayMS).UTC().Format("2006-01-02T15:04")
	for _, path := range []string{
		"dashboard?period=24h",
		"dashboard?period=7d",
		"dashboard?period=30d&by=model",
		"dashboard?period=30d&measure=cost",
		"dashboard?period=90d&measure=cost",
		"dashboard?period=90d&by=model",
		"dashboard?period=90d" + project,
		"dashboard?period=24h" + project,
		"requests",
		"requests?to=" + middle,
		"requests?outcome=lost",
		"requests?model=none&to=" + middle,
		"requests?status=5xx&model=gpt-5",
		"requests?project=proj_scale0000006",
		"requests?outcome=lost" + project,
		"requests?token=tok_scale00000007",
		"requests?order=-cost",
		"requests?order=time&period=90d" + project,
		"requests?search=zq",
		"requests?search=no+such+call" + project,
		"requests?search=gpt-4o&period=30d",
		"requests?cache=hit",
		"requests?cost=none",
		"requests?cause=proxy",
		"requests?endpoint=POST+%2Fv1%2Fmessages",
		"requests?session=none",
		"requests?end_user=none",
		"requests?tag=team%3Dnone",
		"requests?status=429&period=90d",
		"streams",
		"prices",
		"audit",
		"settings",
		"tokens",
		"tokens?name=seeded+7",
		"tokens?search=zq",
		"tokens?search=no+such+token",
		"projects",
		"projects?search=zq",
		"projects?order=-cost",
	} {
		b.Run(path, func(b *testing.B) {
			var times []time.Duration
			size := 0
			for b.Loop() {
				d, text := s.call("GET", "/admin/"+path, "", "")
				times, size = append(times, d), len(text)
			}
			reportTimes(b, "", times)
			b.ReportMetric(float64(size)/1024, "KiB")
		})
	}
}

// A sqlStatement is SQL in the source.
type sqlStatement struct{ position, text string }

// sqlSource evaluates constant string expressions in source files: literals, constants, and what + makes of
// them.
type sqlSource struct {
	files  *token.FileSet
	consts map[string]ast.Expr // by function and name, or name alone outside functions
	read   map[*ast.BasicLit]bool
}

// fold returns the text of an expression, and false if it is not constant.
func (s *sqlSource) fold(scope string, e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		s.read[e] = true
		return text, err == nil && e.Kind == token.STRING
	case *ast.BinaryExpr:
		x, okX := s.fold(scope, e.X)
		y, okY := s.fold(scope, e.Y)
		return x + y, okX && okY && e.Op == token.ADD
	case *ast.Ident:
		for _, name := range []string{scope + "." + e.Name, e.Name} {
			if c := s.consts[name]; c != nil {
				return s.fold(scope, c)
			}
		}
	}
	return "", false
}

// statements returns the largest constant expressions in a declaration that are SQL.
func (s *sqlSource) statements(scope string, node ast.Node) (out []sqlStatement) {
	verb := regexp.MustCompile(`^\s*(SELECT|INSERT|UPDATE|DELETE|WITH) `)
	ast.Inspect(node, func(n ast.Node) bool {
		if d, ok := n.(*ast.GenDecl); ok && d.Tok == token.CONST {
			return false // used by its name elsewhere
		}
		e, ok := n.(ast.Expr)
		if !ok {
			return true
		}
		text, ok := s.fold(scope, e)
		if ok && verb.MatchString(text) {
			out = append(out, sqlStatement{s.files.Position(e.Pos()).String(), text})
		}
		return !ok
	})
	return out
}

// readStatements returns the statements of store*.go, and fails the test if there is SQL that it cannot read.
// store_files.go is left out: it works on whole databases, which no server has open.
func readStatements(t *testing.T) (out []sqlStatement) {
	t.Helper()
	names, err := filepath.Glob("store*.go")
	if err != nil {
		t.Fatal(err)
	}
	s := &sqlSource{files: token.NewFileSet(), consts: map[string]ast.Expr{}, read: map[*ast.BasicLit]bool{}}
	type part struct {
		scope string
		node  ast.Node
	}
	var parts []part
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") || name == "store_files.go" {
			continue
		}
		file, err := parser.ParseFile(s.files, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			scope := ""
			if f, ok := d.(*ast.FuncDecl); ok {
				scope = name + " " + f.Name.Name
			}
			parts = append(parts, part{scope, d})
			ast.Inspect(d, func(n ast.Node) bool {
				if v, ok := n.(*ast.ValueSpec); ok {
					for i := range v.Values {
						s.consts[strings.TrimPrefix(scope+"."+v.Names[i].Name, ".")] = v.Values[i]
					}
				}
				return true
			})
		}
	}
	for _, p := range parts {
		out = append(out, s.statements(p.scope, p.node)...)
	}
	verb := regexp.MustCompile(`\b(SELECT|INSERT INTO|UPDATE|DELETE FROM)\b`)
	for _, p := range parts {
		ast.Inspect(p.node, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && !s.read[l] && verb.MatchString(l.Value) {
				t.Errorf("%s: SQL that this test cannot read", s.files.Position(l.Pos()))
			}
			return true
		})
	}
	return out
}

// queryPlan returns the lines of a statement's plan.
func queryPlan(ctx context.Context, st *store, text string) ([]string, error) {
	numbers := regexp.MustCompile(`\?(\d+)`).FindAllStringSubmatch(text, -1)
	count := 0
	for _, m := range numbers {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			return nil, err
		}
		count = max(count, n)
	}
	if len(numbers) == 0 {
		count = strings.Count(text, "?")
	}
	type line struct {
		id, parent, unused int
		detail             string
	}
	lines, err := collect(ctx, st.writeDB, "explaining", func(l *line) []any {
		return []any{&l.id, &l.parent, &l.unused, &l.detail}
	}, "EXPLAIN QUERY PLAN "+text, make([]any, count)...)
	var out []string
	for _, l := range lines {
		out = append(out, l.detail)
	}
	return out, err
}

// fullScans returns the lines of a plan that scan a growing table, or all sums of one grain.
func fullScans(text string, lines []string) (bad []string) {
	mention := regexp.MustCompile(
		`\b(requests|tokens|usage_sums|project_hours|project_latency|audit|contents|cache)\b(?: (?:AS )?([a-z]\w*))?`)
	growing := map[string]string{} // growing tables, by name and alias
	for _, m := range mention.FindAllStringSubmatch(text, -1) {
		growing[m[1]] = m[1]
		if m[2] != "" {
			growing[m[2]] = m[1]
		}
	}
	for _, line := range lines {
		words := strings.Fields(line)
		if len(words) < 2 || growing[words[1]] == "" {
			continue
		}
		if words[0] == "SCAN" ||
			growing[words[1]] == "usage_sums" && !strings.Contains(line, "(grain=? AND project=?") {
			bad = append(bad, line)
		}
	}
	return bad
}

// TestNoFullScans: no statement scans a growing table. Management keys, projects, upstreams, prices and settings
// stay few and may be scanned.
func TestNoFullScans(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it reads the plans of its queries")
	p := newTest(t, nil)
	statements := readStatements(t)
	if len(statements) < 40 {
		t.Errorf("only %d statements were found", len(statements))
	}
	for _, st := range statements {
		if strings.HasPrefix(fmt.Sprint(st.position), "store_postgres") {
			continue // PostgreSQL's plans depend on its statistics
		}
		if strings.Contains(st.text, "temp.") {
			continue // the table exists only within its transaction
		}
		lines, err := queryPlan(t.Context(), p.instance.store, st.text)
		if err != nil {
			t.Errorf("%s: %v in %s", st.position, err, st.text)
			continue
		}
		if bad := fullScans(st.text, lines); len(bad) > 0 {
			t.Errorf("%s: %s\n%s", st.position, strings.Join(bad, "; "), st.text)
		}
	}
	for text, want := range map[string]int{ // the test itself can fail
		`SELECT name FROM tokens WHERE name LIKE ?`:                                        1,
		`SELECT 1 FROM requests r WHERE r.model = ?`:                                       1,
		`SELECT 1 FROM usage_sums WHERE grain = ? AND at > ?`:                              1,
		`DELETE FROM tokens`:                                                               1,
		`SELECT 1 FROM tokens WHERE seq = ?`:                                               0,
		`SELECT 1 FROM usage_sums WHERE grain = ? AND project = ? AND token > ?2`:          0,
		`SELECT name FROM projects WHERE name LIKE ?`:                                      0,
		`SELECT 1 FROM (SELECT max(id) AS m FROM requests) JOIN tokens t ON t.seq + 1 = m`: 1,
	} {
		lines, err := queryPlan(t.Context(), p.instance.store, text)
		if err != nil || len(fullScans(text, lines)) != want {
			t.Errorf("%s: %v %v", text, lines, err)
		}
	}
}

// TestRowsStay: no statement changes the row of a call, but for the one that erases an end user, which changes names
// alone. Only the one for old calls deletes rows.
func TestRowsStay(t *testing.T) {
	t.Parallel()
	update := regexp.MustCompile(`(UPDATE|REPLACE INTO) requests\b|INTO requests\b[^;]*ON CONFLICT[^;]*DO UPDATE`)
	remove := regexp.MustCompile(`DELETE FROM requests\b`)
	const erase = `UPDATE requests SET session = ?, end_user = ?, tags = ? WHERE id = ?`
	deletes, inserts := 0, 0
	for _, st := range readStatements(t) {
		if update.MatchString(st.text) && st.text != erase {
			t.Errorf("%s changes rows: %s", st.position, st.text)
		}
		if remove.MatchString(st.text) {
			deletes++
		}
		if strings.Contains(st.text, "INSERT INTO requests ") {
			inserts++
		}
	}
	if deletes != 1 || inserts == 0 {
		t.Errorf("%d statements delete rows and %d insert some", deletes, inserts)
	}
}

// BenchmarkLedgerBatch writes batches of 50 calls, which have one token or each their own, or are those of agents: each
// session has two of them, and the provider had a part of the prompt cached.
func BenchmarkLedgerBatch(b *testing.B) {
	for _, v := range []struct {
		name     string
		tokens   int
		sessions bool
	}{{"tokens=1", 1, false}, {"tokens=50", 50, false}, {"sessions=25", 1, true}} {
		tokens := v.tokens
		b.Run(v.name, func(b *testing.B) {
			file := filepath.Join(b.TempDir(), "ledger.db")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				b.Fatal(err)
			}
			st, err := openStore(b.Context(), file)
			if err != nil {
				b.Fatal(err)
			}
			defer st.close()
			w, ids := st.newLedgerWriter(), newIDSource(0, nil)
			defer w.close()
			write := func(batch ledgerBatch, _ func()) {
				if err := w.write(context.Background(), batch); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				pending := &pendingBatch{}
				var entries []*ledgerEntry
				for i := range 50 {
					now := time.Now()
					row := requestRow{id: ids.next(now), started: now.UnixMilli(),
						project: int64(1 + i%min(tokens, 5)), token: int64(1 + i%tokens),
						endpoint: "POST /v1/chat/completions", model: "gpt-4o", modelTracked: true,
						status: 200, outcome: outcomeOK, source: usageExact,
						counts: tokenCounts{input: 900, output: 250}, cost: 400_000, priced: true,
						firstByteUS: int64(100_000 + i*20_000), totalUS: int64(300_000 + i*70_000), attempts: 1}
					if v.sessions {
						row.counts.cached, row.routedBy = 300, "session"
						row.attribution = &attribution{ // ids of sessions are random
							session: fmt.Sprintf("%016x-8f60-01998f2e3b4c", uint64(row.id>>1)*0x9e3779b97f4a7c15)}
					}
					pending.add(row.id, row.appendPendingRecord(nil))
					entries = append(entries, &ledgerEntry{row: row, batch: pending})
				}
				write(buildLedgerBatch(pending, nil, nil))
				write(buildLedgerBatch(nil, entries, nil))
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/50, "µs/call")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// TestHoursAgree: the hours of a project, and those of all projects together, equal the sums of the calls, and
// only old ones are deleted.
func TestHoursAgree(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	random := rand.New(rand.NewPCG(7, 7))
	for i := range 200 {
		at := u.now.Add(-time.Duration(random.Int64N(int64(50 * time.Hour))))
		r := *u.rows[random.IntN(len(u.rows))]
		r.id, r.started = minIDAt(at)+int64(1000+i), at.UnixMilli()
		r.firstByteUS = random.Int64N(3e6)
		r.totalUS = r.firstByteUS + random.Int64N(200e6)
		u.rows = append(u.rows, &r)
		u.instance.ledger.recordRefused(&r, i%2 == 0) // with a row or without: the sums have all
	}
	u.waitSettled()
	now := u.now.UnixMilli()
	from, to := now-30*hourMS-now%hourMS, now-3*hourMS-now%hourMS
	check := func(project int64) {
		t.Helper()
		want := &hourSum{}
		for _, r := range u.rows {
			if (project == 0 || r.project == project) && r.started >= from && r.started < to {
				want.add(r)
			}
		}
		got, err := u.instance.store.sumHours(t.Context(), project, from, to)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("project %d: %+v, want %+v, %v", project, got, want, err)
		}
		if n := want.firstByteLatency.total(); n == 0 || n != want.totalLatency.total() || want.errors[0] == 0 {
			t.Errorf("project %d: the test proves nothing: %+v", project, want)
		}
	}
	check(0)
	for seq := range u.projects {
		check(seq)
	}
	for n := int64(1); n > 0; {
		var err error
		if n, err = u.instance.store.deleteOldHours(t.Context(), from, 1); err != nil {
			t.Fatal(err)
		}
	}
	check(0)
	if h, err := u.instance.store.sumHours(t.Context(), 0, 0, from); err != nil || h.calls != 0 {
		t.Errorf("old hours are left: %+v, %v", h, err)
	}
}

// TestHoursMigrated: the sums of an older database are added up for all projects together, and by hour for the
// dashboard.
func TestHoursMigrated(t *testing.T) {
	t.Parallel()
	const day = 20_000 * dayMS
	var sums []string
	for project := 1; project <= 2; project++ {
		for i, o := range []callOutcome{outcomeOK, outcomeRefused, outcomeClientGone, outcomeUpstreamError,
			outcomeLost} {
			for _, grain := range []string{"hour", "day"} {
				sums = append(sums, fmt.Sprintf(`
					INSERT INTO usage_sums (grain, project, token, at, model, endpoint, outcome, calls, input_tokens,
						cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, total_us)
					VALUES ('%s', %d, 0, %d, 'm', 'e', '%s', %d, 100, 0, 10, 0, 5, 1, 0, 9)`,
					grain, project, int64(day), string(o), i+1))
			}
		}
	}
	st := mustOpenStore(t, oldDatabase(t, "schema/004_project_hours.sql", sums...))
	for project, times := range map[int64]int64{0: 2, 1: 1, 2: 1} {
		want := hourSum{calls: 15 * times, input: 500 * times, output: 50 * times, cost: 25 * times,
			unpriced: 5 * times, errors: [4]int64{3 * times, 2 * times, 4 * times, 5 * times}}
		if h, err := st.sumHours(t.Context(), project, day, day+hourMS); err != nil || *h != want {
			t.Errorf("project %d: %+v, %v", project, h, err)
		}
	}
	for query, want := range map[string]int64{
		`SELECT sum(calls) FROM usage_sums WHERE grain = 'hour' AND project = 0`:                          30,
		`SELECT count(*) FROM usage_sums WHERE grain = 'day' AND project = 0`:                             5,
		`SELECT sum(calls) FROM usage_sums WHERE grain = 'token' AND project = 1 AND token = 0`:           15,
		`SELECT count(*) FROM usage_sums WHERE grain = 'token' AND token = 0 AND model || endpoint <> ''`: 0,
	} {
		var n int64
		if err := st.readDB.QueryRow(query).Scan(&n); err != nil || n != want {
			t.Errorf("%s: %d, %v", query, n, err)
		}
	}
}

// TestLatencyMigrated: a database with latency in columns has the same counts once it has rows.
func TestLatencyMigrated(t *testing.T) {
	t.Parallel()
	const day = 20_000 * dayMS
	want, statements := randomHours(day)
	st := mustOpenStore(t, oldDatabase(t, "schema/012_latency.sql", statements...))
	for project, hours := range want {
		got, err := st.hourSumsByStep(t.Context(), project, day, day+3*hourMS, hourMS)
		if err != nil || !slices.Equal(got, hours) {
			t.Errorf("project %d: %+v, want %+v, %v", project, got, hours, err)
		}
		var total hourSum
		for i := range hours {
			total.merge(&hours[i])
		}
		sum, err := st.sumHours(t.Context(), project, day, day+3*hourMS)
		if err != nil || *sum != total {
			t.Errorf("project %d: %+v, want %+v, %v", project, sum, total, err)
		}
	}
	empty, err := queryValue[int](t.Context(), st.readDB, "counting",
		`SELECT count(*) FROM project_latency WHERE first_bytes + answers = 0`)
	if err != nil || empty != 0 {
		t.Errorf("%d empty buckets: %v", empty, err)
	}
}

// randomHours returns three hours of each of three projects, of which the second has no calls, and the
// statements that store them as they were before schema/012.
func randomHours(from int64) (hours map[int64][]hourSum, statements []string) {
	random := rand.New(rand.NewPCG(12, 12))
	hours = map[int64][]hourSum{}
	for project := range int64(3) {
		hours[project] = make([]hourSum, 3)
		for _, i := range []int64{0, 2} {
			h := &hours[project][i]
			values := []any{project, from + i*hourMS}
			for _, column := range h.columns() {
				n := column.(*int64)
				*n = random.Int64N(1000)
				values = append(values, *n)
			}
			for _, latency := range []*latencyHistogram{&h.firstByteLatency, &h.totalLatency} {
				for bucket := range latency {
					latency[bucket] = max(0, random.Int64N(200)-100) // many are empty
					values = append(values, latency[bucket])
				}
			}
			list := strings.ReplaceAll(strings.Trim(fmt.Sprint(values), "[]"), " ", ", ")
			statements = append(statements, "INSERT INTO project_hours VALUES ("+list+")")
		}
	}
	return hours, statements
}

// TestQuantiles: the error of a quantile is at most a tenth, at any scale.
func TestQuantiles(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	for _, typical := range []float64{30_000, 400_000, 9_000_000} {
		var h latencyHistogram
		var all []float64
		for range 20_000 {
			us := typical * math.Exp(random.NormFloat64()*0.6)
			all = append(all, us/1000)
			h.observe(int64(us))
		}
		slices.Sort(all)
		for _, q := range []float64{0.5, 0.95} {
			got, want := h.quantile(q), all[int(q*float64(len(all)))]
			if math.Abs(got/want-1) > 0.1 {
				t.Errorf("p%v around %v µs: %v ms, want %v", q*100, typical, got, want)
			}
		}
	}
	var none, slow, one latencyHistogram
	slow.observe(100_000_001)
	one.observe(500_000)
	if none.quantile(0.5) != -1 || !math.IsInf(slow.quantile(0.5), 1) ||
		one.quantile(0.5) < 400 || one.quantile(0.95) > 630 {
		t.Error(none.quantile(0.5), slow.quantile(0.5), one.quantile(0.5), one.quantile(0.95))
	}
}
