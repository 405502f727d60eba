// A benchmark of the pages with 1,000 projects and 1,000,000 tokens:
//
//	go test -run '^$' -bench ScaleAdmin -benchtime 20x -timeout 60m .
package main

import (
	"html"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
)

// BenchmarkScaleAdmin walks through lists, ten pages deep, and opens single
// pages. Most tokens have no end, and a name that many others have: where an
// order by such a thing does not walk an index, it shows.
func BenchmarkScaleAdmin(b *testing.B) {
	s := newScaleTest(b)
	defer s.close()
	s.seed(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
		INSERT INTO projects (id, name, created_at, updated_at) SELECT 'proj_' || hex(randomblob(8)), 'project ' || i, 1764000000000, 1764000000000 FROM n`, `
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)
		INSERT INTO tokens (id, project, name, hash, expires_at, revoked_at, last_used_at, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), CASE WHEN i % 3 = 0 THEN 7 ELSE 1 + i % 1000 END, CASE WHEN i % 2 = 0 THEN 'unnamed' ELSE 'seeded ' || hex(randomblob(3)) END,
			randomblob(32), CASE WHEN i % 10 = 0 THEN 1 WHEN i % 10 = 1 THEN unixepoch() * 1000 + 86400000 + i END, CASE WHEN i % 20 = 3 THEN 1764000000000 END,
			CASE WHEN i % 4 > 0 THEN 1764000000000 + i END, 1764000000000 + i, 1764000000000 + i FROM n`)
	client := s.web.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	var cookie string
	do := func(method, path string, form url.Values) (time.Duration, string) {
		req, err := http.NewRequestWithContext(b.Context(), method, s.web.URL+path, strings.NewReader(form.Encode()))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
		req.Header.Set("Cookie", cookie)
		start := time.Now()
		res, err := client.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		took := time.Since(start)
		if err != nil || res.StatusCode > 399 || method == "GET" && res.StatusCode != 200 {
			b.Fatalf("%s: %d %v %s", path, res.StatusCode, err, text)
		}
		if method == "POST" {
			cookie, _, _ = strings.Cut(res.Header.Get("Set-Cookie"), ";")
		}
		return took, string(text)
	}
	do("POST", "/admin/sign-in", url.Values{"key": {s.key()}})
	p, err := s.in.store.projectBySeq(b.Context(), 7)
	if err != nil {
		b.Fatal(err)
	}
	_, page := do("GET", "/admin/tokens", nil)
	token := between(page, `class="name" href="`, `"`)
	next := regexp.MustCompile(`href="(/admin/tokens\?[^"]*after=[^"]*)"`)
	for _, path := range []string{"/admin/projects", "/admin/projects/" + p.id, token, "/admin/tokens/new", "/admin/tokens", "/admin/tokens?order=oldest", "/admin/tokens?order=name",
		"/admin/tokens?order=ends", "/admin/tokens?name=unn", "/admin/tokens?name=seeded+A", "/admin/tokens?state=active", "/admin/tokens?state=expiring", "/admin/tokens?state=expired",
		"/admin/tokens?state=revoked", "/admin/tokens?state=unused", "/admin/tokens?state=active&project_id=" + p.id, "/admin/tokens?state=revoked&project_id=" + p.id,
		"/admin/tokens?order=name&project_id=" + p.id, "/admin/tokens?state=revoked&name=unn"} {
		b.Run(strings.ReplaceAll(strings.TrimPrefix(path, "/admin/"), p.id, "ID"), func(b *testing.B) {
			var times []time.Duration
			to := path
			for b.Loop() {
				took, page := do("GET", to, nil)
				times = append(times, took)
				if m := next.FindStringSubmatch(page); m != nil && strings.HasPrefix(path, "/admin/tokens") {
					to = html.UnescapeString(m[1])
				}
			}
			report(b, "", times)
		})
	}
}
