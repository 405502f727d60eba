// Benchmarks at the sizes that are promised: a million tokens, and the sums that
// ten million calls leave behind. They seed a database for minutes, so nothing
// but -bench runs them:
//
//	go test -run '^$' -bench Scale -benchtime 20x -timeout 60m .
package main

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A scaleTest is a server on a seeded database.
type scaleTest struct {
	b      *testing.B
	env    map[string]string
	in     *instance
	web    *httptest.Server
	key    secret
	cookie string // of a session; "" where the key is presented
}

func newScaleTest(b *testing.B) *scaleTest {
	b.Helper()
	provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, chatAnswer)
	}))
	b.Cleanup(provider.Close)
	s := &scaleTest{b: b, env: map[string]string{"DATA_DIR": filepath.Join(b.TempDir(), "data"), "ALLOW_PRIVATE_UPSTREAMS": "true",
		"OPENAI_API_URL": provider.URL, "LOG_LEVEL": "warn"}}
	s.open()
	var err error
	if s.key, err = s.in.firstKey(b.Context()); err != nil {
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
	if s.in, err = openInstance(context.Background(), cfg, newLogger(s.b.Output(), cfg.logLevel, true)); err != nil {
		s.b.Fatal(err)
	}
	s.web = httptest.NewServer(s.in.routes())
	return time.Since(start)
}

func (s *scaleTest) close() {
	s.web.Close()
	if err := s.in.close(); err != nil {
		s.b.Error(err)
	}
}

// seed runs statements in one transaction, with a page cache that fits them.
func (s *scaleTest) seed(statements ...string) {
	s.b.Helper()
	ctx := s.b.Context()
	if _, err := s.in.store.write.ExecContext(ctx, `PRAGMA cache_size = -400000`); err != nil {
		s.b.Fatal(err)
	}
	err := s.in.store.tx(ctx, func(tx *sql.Tx) error {
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
	if _, err := s.in.store.write.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`); err != nil {
		s.b.Fatal(err)
	}
}

// call makes a call, expects 2xx, and returns how long it took, and the answer.
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

// report reports the median and the worst of some times, in milliseconds.
func report(b *testing.B, name string, times []time.Duration) {
	slices.Sort(times)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(0, "ns/op") // says nothing here
	b.ReportMetric(ms(times[len(times)/2]), name+"p50-ms")
	b.ReportMetric(ms(times[len(times)-1]), name+"max-ms")
}

// seedProjects makes 50 projects with an upstream each; their seqs are 1 to 50.
func (s *scaleTest) seedProjects() {
	s.b.Helper()
	for i := range 50 {
		if _, err := s.in.firstProject(s.b.Context(), fmt.Sprintf("project %02d", i), newSecret("sk-scale-"+randomBase62(40))); err != nil {
			s.b.Fatal(err)
		}
	}
}

// BenchmarkScaleTokens has 1,000,000 tokens: start, first and later use of a
// token, pages of the list.
func BenchmarkScaleTokens(b *testing.B) {
	s := newScaleTest(b)
	s.seedProjects()
	s.seed(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)
		INSERT INTO tokens (id, project, name, hash, expires_at, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), 1 + i % 50, 'seeded ' || hex(randomblob(3)), randomblob(32),
			CASE WHEN i % 10 = 0 THEN 1 END, 1764000000000 + i, 1764000000000 + i FROM n`)
	var tokens []string
	for range 200 {
		var row tokenRow
		value, public := mintCredential(tokenPrefix, "")
		hash, _, _ := hashCredential(tokenPrefix, value())
		row = tokenRow{id: "tok_" + public, name: "used", hash: hash[:], policy: "{}", createdAt: 1, updatedAt: 1}
		p, err := s.in.store.projectBySeq(b.Context(), 7)
		if err != nil {
			b.Fatal(err)
		}
		row.projectID = p.id
		if err := s.in.store.addToken(b.Context(), systemOrigin(time.Now()), &row); err != nil {
			b.Fatal(err)
		}
		tokens = append(tokens, value())
	}
	s.close()

	b.Run("start", func(b *testing.B) {
		var times []time.Duration
		for b.Loop() {
			times = append(times, s.open())
			s.close()
		}
		report(b, "", times)
	})
	s.open()
	defer s.close()
	b.Run("use", func(b *testing.B) {
		s.call("POST", "/v1/chat/completions", chatBody(), tokens[0]) // opens the connections
		var first, later []time.Duration
		for b.Loop() {
			for _, token := range tokens[1:] {
				for i := range 3 {
					d, _ := s.call("POST", "/v1/chat/completions", chatBody(), token)
					if i == 0 {
						first = append(first, d)
					} else {
						later = append(later, d)
					}
				}
			}
			tokens = tokens[:1] // a first use happens once
		}
		report(b, "first-", first)
		report(b, "later-", later)
	})
	_, projects := s.call("GET", "/manage/projects?limit=1", "", s.key())
	project := between(projects, `{"data":[{"id":"`, `"`)
	for _, query := range []string{"", "?limit=500", "?project_id=" + project, "?name=seeded", "?name=seeded+7", "?name=seeded&project_id=" + project, "?active=false"} {
		b.Run("list"+query, func(b *testing.B) {
			path := "/manage/tokens" + query
			var times []time.Duration
			for b.Loop() {
				d, page := s.call("GET", path, "", s.key())
				times = append(times, d)
				if next := between(page, `"next":"`, `"`); next != "" {
					path = "/manage/tokens" + query + map[bool]string{true: "?", false: "&"}[query == ""] + "after=" + next
				}
			}
			report(b, "", times)
		})
	}
}

// between returns what stands in text after from and before to.
func between(text, from, to string) string {
	_, rest, _ := strings.Cut(text, from)
	found, _, _ := strings.Cut(rest, to)
	return found
}

// BenchmarkScaleUsage has the sums of more than 10,000,000 calls: 90 days, 50 projects,
// 1,000 tokens of which a few are busy, each with 5 models.
func BenchmarkScaleUsage(b *testing.B) {
	s := newScaleTest(b)
	defer func() { s.close() }()
	s.seedProjects()
	last := (time.Now().UnixMilli()/dayMS + 1) * dayMS // the end of today
	const columns = `(grain, token, at, project, model, endpoint, outcome, calls, input_tokens, cached_tokens, output_tokens,
		reasoning_tokens, cost, unpriced_calls, estimated_calls, total_us)`
	const sums = `sum(calls), sum(input_tokens), sum(cached_tokens), sum(output_tokens), sum(reasoning_tokens), sum(cost), 0, sum(estimated_calls), sum(total_us)`
	s.seed(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 950)
		INSERT INTO tokens (id, project, name, hash, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), 1 + i % 50, 'seeded ' || i, randomblob(32), 1764000000000 + i, 1764000000000 + i FROM n`,
		// A cell's calls are its share, rounded up or down by chance, so that
		// quiet tokens leave gaps.
		fmt.Sprintf(`
		WITH RECURSIVE hours (h) AS (SELECT 0 UNION ALL SELECT h + 1 FROM hours WHERE h < 90 * 24 - 1),
			models (model, share) AS (VALUES ('gpt-4o', 0.2), ('gpt-4o-mini', 0.5), ('gpt-5', 0.2), ('gpt-5-mini', 0.05), ('text-embedding-3-small', 0.05)),
			cells AS (
				SELECT t.seq AS token, t.project, h, model, cast(share * 22000000.0 / 2160 / 1000 * 5 / (1 + 9 * (t.seq %% 100) / 20.0)
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
		SELECT 'day', token, at - at % 86400000, project, model, endpoint, outcome, `+sums+` FROM usage_sums WHERE grain = 'hour'
		GROUP BY token, at - at % 86400000, project, model, endpoint, outcome`,
		`INSERT INTO usage_sums `+columns+`
		SELECT 'token', token, at, project, '', '', '', `+sums+` FROM usage_sums WHERE grain = 'day' GROUP BY token, at, project`)
	rows, err := s.in.store.read.QueryContext(b.Context(), `SELECT grain, token <> 0, count(*), sum(calls) FROM usage_sums GROUP BY 1, 2`)
	if err != nil {
		b.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var grain string
		var single bool
		var count, calls int64
		if err := rows.Scan(&grain, &single, &count, &calls); err != nil {
			b.Fatal(err)
		}
		b.Logf("grain %s, single tokens %v: %d rows, %d calls", grain, single, count, calls)
	}
	rows.Close()
	_, projects := s.call("GET", "/manage/projects?limit=1", "", s.key())
	project := between(projects, `{"data":[{"id":"`, `"`)
	_, tokens := s.call("GET", "/manage/tokens?limit=1", "", s.key())
	token := between(tokens, `{"data":[{"id":"`, `"`)
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
			report(b, "", times)
			b.ReportMetric(float64(size), "rows")
		})
	}
}
