// Benchmark of the pages that show calls, at the sizes that are promised:
// 10,000,000 calls on record, 1,000 projects, 1,000,000 tokens. It seeds for some
// minutes and needs 5 GB below TMPDIR; see store_scale_test.go for how to run it.
package main

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// seedPages fills the database. Calls are evenly spread over 90 days and, by a
// number that is prime to all else, over projects and tokens.
func (s *scaleTest) seedPages(last int64) {
	s.b.Helper()
	const sums = `(grain, project, token, at, model, endpoint, outcome, calls, input_tokens, cached_tokens, output_tokens,
		reasoning_tokens, cost, unpriced_calls, estimated_calls, total_us)`
	const series = `WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < %d - 1) `
	const models = `models (model, share) AS (VALUES ('gpt-4o', 4), ('gpt-4o-mini', 10), ('gpt-5', 4), ('gpt-5-mini', 1), ('text-embedding-3-small', 1))`
	from := last - 90*dayMS
	start := time.Now()
	s.seed(fmt.Sprintf(series, 1000) + `
			INSERT INTO projects (id, name, created_at, updated_at) SELECT printf('proj_scale%07d', i), printf('project %04d', i), 1, 1 FROM n`)
	s.seed(fmt.Sprintf(series, 1_000_000) + `
			INSERT INTO tokens (id, project, name, hash, expires_at, created_at, updated_at)
			SELECT printf('tok_scale%08d', i), 1 + i % 1000, 'seeded ' || i, randomblob(32), ` + fmt.Sprint(last) + ` + i * 7000, 1764000000000 + i, 1764000000000 + i FROM n`)
	for part := range int64(10) {
		s.seed(fmt.Sprintf(series, 1_000_000) + fmt.Sprintf(`
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome, error_code, usage_source,
				input_tokens, output_tokens, cost, first_byte_us, total_us)
			SELECT (%d + i * 777) << 21, 1 + i * 7919 %% 1000, 1 + i * 7919 %% 1000000, 0, 'POST /v1/chat/completions',
				CASE i %% 5 WHEN 0 THEN 'gpt-5' WHEN 1 THEN 'gpt-4o' ELSE 'gpt-4o-mini' END, i %% 2, '192.0.2.1',
				CASE WHEN i %% 50 = 0 THEN 500 ELSE 200 END, CASE WHEN i %% 50 = 0 THEN 'upstream_error' ELSE 'ok' END, '', 'exact', 900, 250, 400000, 300000, 2000000
			FROM n`, from+part*777_000_000))
	}
	s.b.Logf("calls after %v", time.Since(start))
	perHour := fmt.Sprintf(`, %s SELECT '%%s', %%s, 0, %d + n.i * %%d, model, endpoint, outcome,
			share * %%d, share * 900, 0, share * 250, 0, share * 400000, 0, 0, share * 900000
			FROM n CROSS JOIN models CROSS JOIN (SELECT 'ok' AS outcome UNION ALL SELECT 'upstream_error')
			CROSS JOIN (SELECT 'POST /v1/chat/completions' AS endpoint UNION ALL SELECT 'POST /v1/embeddings')`, models, from)
	for _, of := range []struct {
		grain, project string
		steps, length  int64
	}{{"hour", "0", 90 * 24, hourMS}, {"day", "0", 90, dayMS}, {"hour", "7", 90 * 24, hourMS}, {"day", "7", 90, dayMS}} {
		s.seed(fmt.Sprintf("INSERT INTO usage_sums "+sums+" "+series, of.steps) + fmt.Sprintf(perHour, of.grain, of.project, of.length, of.length/hourMS))
	}
	s.seed(fmt.Sprintf("INSERT INTO usage_sums "+sums+" "+series, 90) + fmt.Sprintf(`
			SELECT 'token', p.seq, 0, %d + i * 86400000, '', '', '', 111, 99900, 0, 27750, 0, 44400000, 0, 0, 1 FROM projects p CROSS JOIN n`, from))
	s.seed(fmt.Sprintf("INSERT INTO usage_sums "+sums+" "+series, 90) + fmt.Sprintf(`
			SELECT 'token', t.project, t.seq, %d + i * 86400000, '', '', '', 1, 900, 0, 250, 0, 400000, 0, 0, 1 FROM (SELECT seq, project FROM tokens LIMIT 20000) t CROSS JOIN n`, from))
	columns := strings.Repeat(", i % 7", 2*buckets)
	s.seed(fmt.Sprintf("INSERT INTO project_hours "+series, 90*24) + fmt.Sprintf(`
			SELECT p.seq, %d + i * 3600000, 5, 4500, 1250, 2000000, 0, 0, 0, 1, 0%s FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p CROSS JOIN n`, from, columns))
	s.b.Logf("all after %v", time.Since(start))
}

// BenchmarkScalePages loads each page that shows many calls, signed in.
func BenchmarkScalePages(b *testing.B) {
	s := newScaleTest(b)
	defer func() { s.close() }()
	last := (time.Now().UnixMilli()/dayMS + 1) * dayMS
	s.seedPages(last)
	client := *s.web.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	req, err := http.NewRequestWithContext(b.Context(), "POST", s.web.URL+"/admin/sign-in", strings.NewReader(url.Values{"key": {s.key()}}.Encode()))
	if err != nil {
		b.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	res, err := client.Do(req)
	if err != nil || res.StatusCode != 303 {
		b.Fatal(err, res.StatusCode)
	}
	res.Body.Close()
	s.cookie, _, _ = strings.Cut(res.Header.Get("Set-Cookie"), ";")
	project := "&project=proj_scale0000006"
	middle := time.UnixMilli(last - 45*dayMS).UTC().Format("2006-01-02T15:04")
	for _, path := range []string{
		"dashboard?period=24h", "dashboard?period=7d", "dashboard?period=30d&by=model", "dashboard?period=30d&measure=cost", "dashboard?period=90d&measure=cost", "dashboard?period=90d&by=model", "dashboard?period=90d" + project, "dashboard?period=24h" + project,
		"requests", "requests?to=" + middle, "requests?outcome=lost", "requests?model=none&to=" + middle, "requests?status=5xx&model=gpt-5", "requests?project=proj_scale0000006", "requests?outcome=lost" + project,
		"requests?token=tok_scale00000007", "tokens", "tokens?name=seeded+7", "projects",
	} {
		b.Run(path, func(b *testing.B) {
			var times []time.Duration
			size := 0
			for b.Loop() {
				d, text := s.call("GET", "/admin/"+path, "", "")
				times, size = append(times, d), len(text)
			}
			report(b, "", times)
			b.ReportMetric(float64(size)/1024, "KiB")
		})
	}
}
