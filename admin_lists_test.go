// These tests hold the lists of /admin and /manage: search, the order of columns, pages in both directions, totals.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"html"
	"math"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// listedTokens returns the names of all tokens that /manage/tokens lists, over its pages.
func (p *testProxy) listedTokens(query string) (names []string) {
	p.t.Helper()
	pages := 0
	for path := "/manage/tokens?limit=3&" + query; path != ""; pages++ {
		if pages == 100 {
			p.t.Fatalf("%s has no last page", query)
		}
		var page struct {
			Data []struct{ Name string }
			Next string
		}
		p.manage("GET", path, "", 200, &page)
		for _, t := range page.Data {
			names = append(names, t.Name)
		}
		if path = ""; page.Next != "" {
			path = "/manage/tokens?limit=3&" + query + "&after=" + url.QueryEscape(page.Next)
		}
	}
	slices.Sort(names)
	return names
}

// TestSearch: a search finds what has the text in its name or id, in any case, on pages and in /manage, whatever the
// characters of the text are. It follows every change of a name.
func TestSearch(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"Billing 100%"}`, 201, &other)
	ids := map[string]string{}
	names := []string{"CI/Runner", "ci/nightly", "100% sure", "a_b", `say "hi" OR NOT`, "C*", `back\slash`, "NEAR(x y)",
		"it's; --", "日本語トークン"}
	for i, name := range names {
		var made struct{ ID string }
		project := p.project
		if i == 1 {
			project = other.ID
		}
		p.manage("POST", "/manage/tokens", `{"project_id":"`+project+`","name":`+quoteJSON(name)+`}`, 201, &made)
		ids[name] = made.ID
	}
	link := regexp.MustCompile(`class="name" href="/admin/tokens/[^"]*">([^<]*)<`)
	check := func(text string, want ...string) {
		t.Helper()
		slices.Sort(want)
		query := "search=" + url.QueryEscape(text)
		if got := p.listedTokens(query); !slices.Equal(got, want) {
			t.Errorf("/manage: %q finds %q, want %q", text, got, want)
		}
		for _, order := range []string{"", "oldest", "name", "-cost"} {
			res := b.get("/admin/tokens?" + query + "&order=" + order)
			var got []string
			for _, m := range link.FindAllStringSubmatch(res.body, -1) {
				got = append(got, html.UnescapeString(m[1]))
			}
			if slices.Sort(got); !slices.Equal(got, want) || res.status != 200 || len(checkHTML(res.body)) > 0 {
				t.Errorf("/admin, order %q: %q finds %q, want %q: %d %v", order, text, got, want, res.status,
					checkHTML(res.body))
			}
		}
	}
	check("Ci/", "CI/Runner", "ci/nightly")
	check("RUNNER", "CI/Runner")
	check("% s", "100% sure")
	check("%", "100% sure")
	check("A_b", "a_b")
	check(`"hi" or`, `say "hi" OR NOT`)
	check(`"`, `say "hi" OR NOT`)
	check(" * ", "C*")
	check(`\s`, `back\slash`)
	check("near(x", "NEAR(x y)")
	check("'s;", "it's; --")
	check("name:ci")
	check("c OR i")
	check("本", "日本語トークン")
	check("本語", "日本語トークン")
	check("語トー", "日本語トークン")
	check("a\x00b")
	check("ci\xff")
	check(strings.Repeat("x", maxSearchBytes))
	check(ids["a_b"][3:], "a_b") // a part of the id
	if got := p.listedTokens("search=ci/&project_id=" + other.ID); !slices.Equal(got, []string{"ci/nightly"}) {
		t.Errorf("in a project: %q", got)
	}
	if got := p.listedTokens("search=runner&name=CI"); !slices.Equal(got, []string{"CI/Runner"}) {
		t.Errorf("with a prefix: %q", got)
	}
	p.manage("PATCH", "/manage/tokens/"+ids["a_b"], `{"name":"renamed"}`, 200, nil)
	check("a_b")
	check("named", "renamed")
	p.manage("DELETE", "/manage/tokens/"+ids["CI/Runner"], "", 200, nil)
	if got := p.listedTokens("search=runner&active=true"); len(got) > 0 {
		t.Errorf("revoked, but active: %q", got)
	}
	for query, found := range map[string]bool{"search=runner": true, "search=runner&order=ends": false,
		"search=runner&order=-ends&state=revoked": true} {
		body := b.get("/admin/tokens?" + query).body
		got := link.MatchString(body)
		if got != found || strings.Contains(body, "Revoked tokens are left out") == found {
			t.Errorf("%s: a revoked token is listed: %v", query, got)
		}
	}
	long := strings.Repeat("x", maxSearchBytes+1)
	for _, path := range []string{"/manage/tokens?search=", "/manage/projects?search=", "/manage/requests?search="} {
		res := p.manageAs(p.adminKey, "GET", path+long, "")
		if res.status != 400 || !strings.Contains(res.body, "search") {
			t.Errorf("%s: %d %s", path, res.status, res.body)
		}
	}
	for _, path := range []string{"/admin/tokens?search=" + long, "/admin/projects?search=" + long,
		"/admin/tokens?limit=7", "/admin/tokens?project_id=proj_none", "/admin/projects?order=x",
		"/admin/tokens?after=1.&before=1."} {
		if res := b.get(path); res.status != 400 || !strings.Contains(res.body, `role="alert"`) {
			t.Errorf("%s: %d", clip(path, 40), res.status)
		}
	}
}

// TestSearchProjects: as TestSearch, for projects. A deleted project is not found.
func TestSearchProjects(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	ids := map[string]string{}
	for _, name := range []string{"Billing 100%", "billing test", "C*"} {
		var made struct{ ID string }
		p.manage("POST", "/manage/projects", `{"name":`+quoteJSON(name)+`}`, 201, &made)
		ids[name] = made.ID
	}
	link := regexp.MustCompile(`class="name" href="/admin/projects/[^"]*">([^<]*)<`)
	check := func(text string, want ...string) {
		t.Helper()
		var page struct{ Data []struct{ Name string } }
		p.manage("GET", "/manage/projects?search="+url.QueryEscape(text), "", 200, &page)
		var got, shown []string
		for _, project := range page.Data {
			got = append(got, project.Name)
		}
		for _, m := range link.FindAllStringSubmatch(b.get("/admin/projects?search="+url.QueryEscape(text)).body, -1) {
			shown = append(shown, html.UnescapeString(m[1]))
		}
		if !slices.Equal(got, want) || !slices.Equal(shown, want) {
			t.Errorf("%q finds %q and shows %q, want %q", text, got, shown, want)
		}
	}
	check("BILL", "Billing 100%", "billing test")
	check("0%", "Billing 100%")
	check("*", "C*")
	check(ids["C*"][6:], "C*")
	p.manage("PATCH", "/manage/projects/"+ids["C*"], `{"name":"D+"}`, 200, nil)
	check("*")
	check("D+", "D+")
	p.manage("DELETE", "/manage/projects/"+ids["billing test"], "", 200, nil)
	check("bill", "Billing 100%")
	check("(deleted")
}

// TestSearchTokenValue: a leaked token, or the beginning of one, is found by it, and the page does not repeat it.
func TestSearchTokenValue(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	public := len(tokenPrefix) + publicLen
	for _, text := range []string{p.token, " " + p.token[:public+5], p.token[:public]} {
		res := b.get("/admin/tokens?search=" + url.QueryEscape(text))
		if to := res.header.Get("Location"); res.status != 303 || to != "/admin/tokens/"+p.tokenID {
			t.Errorf("%q: %d %s", text, res.status, to)
		}
	}
	if res := b.get("/admin/tokens?search=" + p.token[:len(tokenPrefix)+4]); !strings.Contains(res.body, p.tokenID) {
		t.Errorf("a part of the beginning: %d", res.status)
	}
	unknown := p.unknownCredential(tokenPrefix)
	p.secrets = append(p.secrets, unknown)
	if res := b.get("/admin/tokens?search=" + unknown); !strings.Contains(res.body, "No matching tokens") {
		t.Errorf("an unknown token: %d %s", res.status, res.body)
	}
}

// TestSearchCalls: a search for calls finds each word in any of what a list shows; all words must be found.
func TestSearchCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	_, nightly := p.newToken(`"name":"CI Nightly"`)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"attribution":{"tags":["team"]}}}`, 200, nil)
	if res := p.chatWithHeaders("Authorization", "Bearer "+p.token, "X-LLM-Proxy-Session", "s-42",
		"X-LLM-Proxy-Tags", "team=search"); res.status != 200 {
		t.Fatal(res.body)
	}
	p.chatAs(nightly)
	p.waitSettled()
	first, second := p.ledger()[0], p.ledger()[1]
	link := regexp.MustCompile(`class="name" href="/admin/requests/(req_\w+)"`)
	for text, want := range map[string][]string{
		"nightly":         {second.ID},
		"ci NIGHTLY 200":  {second.ID},
		"s-42":            {first.ID},
		"TEAM=search":     {first.ID},
		"team=other":      nil,
		"2xx":             {second.ID, first.ID},
		"gpt-4":           {second.ID, first.ID},
		"gpt-4 s-42":      {first.ID},
		"127.0.0.1":       {second.ID, first.ID},
		"%":               nil,
		"a b c d e":       nil,
		p.project:         {second.ID, first.ID},
		`'; DROP "x" --%`: nil,
	} {
		res := b.get("/admin/requests?search=" + url.QueryEscape(text))
		var shown []string
		for _, m := range link.FindAllStringSubmatch(res.body, -1) {
			shown = append(shown, m[1])
		}
		if !slices.Equal(shown, want) || len(checkHTML(res.body)) > 0 {
			t.Errorf("%q shows %q, want %q %v", text, shown, want, checkHTML(res.body))
		}
		if isTooLong := text == "a b c d e"; isTooLong {
			if !strings.Contains(res.body, "at most 4 words") {
				t.Errorf("%q: no problem is shown", text)
			}
			continue
		}
		var page struct{ Data []struct{ ID string } }
		p.manage("GET", "/manage/requests?search="+url.QueryEscape(text), "", 200, &page)
		var got []string
		for _, r := range page.Data {
			got = append(got, r.ID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("/manage: %q finds %q, want %q", text, got, want)
		}
	}
	if res := b.get("/admin/requests?search=" + first.ID); res.header.Get("Location") != "/admin/requests/"+first.ID {
		t.Errorf("an ID: %d %v", res.status, res.header)
	}
}

// TestSearchMigrated: the names from before the index are found.
func TestSearchMigrated(t *testing.T) {
	t.Parallel()
	st := mustOpenStore(t, oldDatabase(t, "schema/023_search.sql", oneTokenSQL(0)...))
	for text, want := range map[string]int{"tok_": 1, "TOK_A": 1, "t": 1, "tok_b": 0} {
		rows, _, err := st.listTokens(t.Context(), tokenListQuery{order: tokensNewest, search: newSearchTerm(text),
			limit: 10})
		if err != nil || len(rows) != want {
			t.Errorf("%s: %d %v", text, len(rows), err)
		}
	}
	if problems, err := st.checkIntegrity(t.Context()); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

// TestSearchScanned: a text that is too short for the index is found among any number of tokens, in several pages.
func TestSearchScanned(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it adds rows in SQLite's dialect")
	p := newTest(t, nil)
	p.newToken(`"name":"first é"`)
	_, err := execCount(t.Context(), p.instance.store.writeDB, "adding a token", `
		INSERT INTO tokens (seq, id, project, name, hash, revoked_at, created_at, updated_at)
		VALUES (?, 'tok_x', 1, 'x', randomblob(32), 1, 1, 1)`, 2*maxScannedNames+7)
	if err != nil {
		t.Fatal(err)
	}
	p.newToken(`"name":"last É"`)
	if got := p.listedTokens("search=%C3%89"); !slices.Equal(got, []string{"first é", "last É"}) {
		t.Errorf("/manage finds %q", got)
	}
	b := p.signIn(p.adminKey)
	next := regexp.MustCompile(`href="([^"]*)" rel="next"`)
	path, found := "/admin/tokens?search=%C3%89", 0
	for pages := 0; path != "" && pages < 5; pages++ {
		body := b.get(path).body
		found += strings.Count(body, `class="name"`)
		m := next.FindStringSubmatch(body)
		if path = ""; m != nil {
			path = html.UnescapeString(m[1])
		}
	}
	if found != 2 {
		t.Errorf("/admin finds %d", found)
	}
}

// TestSearchBounded: a page of a search in one project reads a bounded number of the tokens that the index finds in all
// of them, and the pages together have all tokens of the project.
func TestSearchBounded(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "PostgreSQL uses the index of the project instead")
	p := newTest(t, nil)
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other"}`, 201, &other)
	for i := range 9 {
		project := p.project
		if i%4 == 0 {
			project = other.ID
		}
		p.manage("POST", "/manage/tokens", fmt.Sprintf(`{"project_id":"%s","name":"common %d"}`, project, i), 201, nil)
	}
	for order, want := range map[string][]string{tokensOldest: {"common 0", "common 4", "common 8"},
		tokensNewest: {"common 8", "common 4", "common 0"}} {
		q := tokenListQuery{order: order, project: other.ID, search: newSearchTerm("ommon"), limit: 5, maxFound: 3}
		var names []string
		pages := 0
		for more := true; more && pages < 9; pages++ {
			rows, scanned, err := p.instance.store.listTokens(t.Context(), q)
			if err != nil || len(rows) > 2 {
				t.Fatal(len(rows), err)
			}
			for _, row := range rows {
				names = append(names, row.name)
			}
			q.afterSeq, more = scanned, scanned != 0
		}
		if !slices.Equal(names, want) || pages != 4 {
			t.Errorf("%s: %q in %d pages", order, names, pages)
		}
	}
}

// TestListPages: a list in any order can be read forwards and backwards, in pages of any size, and has the same entries
// in both directions.
func TestListPages(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	b := u.signIn(u.adminKey)
	for i := range 40 {
		u.newToken(fmt.Sprintf(`"name":"n%d"`, i/4))
	}
	name := regexp.MustCompile(`class="name" href="([^"]*)"`)
	follow := func(rel, body string) string {
		m := regexp.MustCompile(`href="([^"]*)" rel="` + rel + `"`).FindStringSubmatch(body)
		if m == nil {
			return ""
		}
		return html.UnescapeString(m[1])
	}
	read := func(path, rel string) (pages [][]string, last string) {
		for path != "" && len(pages) < 50 {
			res := b.get(path)
			var page []string
			for _, m := range name.FindAllStringSubmatch(res.body, -1) {
				page = append(page, m[1])
			}
			if res.status != 200 || len(page) == 0 || len(page) > 25 || len(checkHTML(res.body)) > 0 {
				t.Fatalf("%s: %d, %d entries %v", path, res.status, len(page), checkHTML(res.body))
			}
			pages, last, path = append(pages, page), path, follow(rel, res.body)
		}
		return pages, last
	}
	var lists []string
	for _, o := range tokenOrders() {
		lists = append(lists, "/admin/tokens?limit=25&order="+o.Value)
	}
	lists = append(lists, "/admin/tokens?limit=25&state=active&order=-ends", "/admin/tokens?limit=25&search=tok_",
		"/admin/tokens?limit=25&search=tok_&order=name", "/admin/tokens?limit=25&state=unused",
		"/admin/requests?limit=25", "/admin/requests?limit=25&order=oldest", "/admin/requests?limit=25&status=2xx")
	for _, path := range lists {
		forwards, last := read(path, "next")
		backwards, _ := read(last, "prev")
		slices.Reverse(backwards)
		if len(forwards) < 2 || !slices.Equal(slices.Concat(forwards...), slices.Concat(backwards...)) {
			t.Errorf("%s: %d pages %v\nbackwards %v", path, len(forwards), forwards, backwards)
		}
		all := slices.Concat(forwards...)
		if slices.Sort(all); len(slices.Compact(slices.Clone(all))) != len(all) {
			t.Errorf("%s lists an entry twice", path)
		}
	}
}

// TestListUse: lists of tokens and projects show what each used in the last 30 days, sort by it, and add it up.
func TestListUse(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"idle"}`, 201, &other)
	busyID, busy := p.newToken(`"name":"busy"`)
	for range 3 {
		p.chatAs(busy)
	}
	p.chat()
	p.waitSettled()
	cost := regexp.MustCompile(`data-label="Cost, 30 days">(?:<a[^>]*>)?([^<]*)`)
	calls := regexp.MustCompile(`data-label="Calls, 30 days">(?:<a[^>]*>|<span class="soft">)?(\d+)`)
	column := func(re *regexp.Regexp, path string) string {
		var out []string
		body := b.get(path).body
		if problems := checkHTML(body); len(problems) > 0 {
			t.Errorf("%s: %v", path, problems)
		}
		for _, m := range re.FindAllStringSubmatch(body, -1) {
			out = append(out, m[1])
		}
		return strings.Join(out, " ")
	}
	var usage struct{ Data []struct{ Cost float64 } }
	p.manage("GET", "/manage/usage?interval=total&group_by=token&token_id="+busyID, "", 200, &usage)
	each := formatMoney(int64(usage.Data[0].Cost*1e9+.5) / 3)
	for path, want := range map[string]string{
		"/admin/tokens?order=-calls": "3 1 4", "/admin/tokens?order=calls": "1 3 4", "/admin/tokens": "3 1 4",
		"/admin/tokens?search=busy": "3 3", "/admin/projects?order=-calls": "4 0 4",
		"/admin/projects?order=used": "0 4 4",
	} {
		if got := column(calls, path); got != want {
			t.Errorf("%s: calls %q, want %q", path, got, want)
		}
	}
	if got := column(cost, "/admin/tokens?order=cost"); !strings.HasPrefix(got, each+" ") || each == "$0" {
		t.Errorf("costs %q, want %q first", got, each)
	}
	if page := b.get("/admin/tokens").body; strings.Count(page, `class="spark"`) != 2 {
		t.Error("there are not two small charts")
	}
	u := &recentUse{}
	u.days[0], u.days[29] = usageTotals{calls: 1}, usageTotals{calls: 1_000_000}
	if got := newSparkline(u).Path; got != "M0 20v-1h.8v1zM29 20v-20h.8v20z" {
		t.Errorf("a small chart: %s", got)
	}
	if at := recentFrom(time.Date(2026, 3, 31, 5, 0, 0, 0, time.UTC).UnixMilli()); at !=
		time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC).UnixMilli() {
		t.Errorf("the recent days begin %v", at)
	}
}

// TestCallsSorted: the list of calls sorts by tokens, cost and time, both ways and over pages, and keeps its filters.
// If more calls match than it sorts, it says so.
func TestCallsSorted(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	b := u.signIn(u.adminKey)
	from := minIDAt(u.now.AddDate(0, 0, -29).Truncate(24 * time.Hour))
	f := requestFilter{before: math.MaxInt64, limit: maxSorted, from: from}
	rows, _, err := u.instance.store.requestsPage(t.Context(), f)
	if err != nil || len(rows) < 100 {
		t.Fatal(len(rows), err)
	}
	for order, key := range map[string]func(*requestView) int64{
		"cost": func(c *requestView) int64 {
			if c.nullCost == nil {
				return -1
			}
			return *c.nullCost
		},
		"tokens": func(c *requestView) int64 { return c.counts.input + c.counts.output },
		"time": func(c *requestView) int64 {
			if c.nullTotalUS == nil {
				return -1
			}
			return *c.nullTotalUS
		},
	} {
		slices.SortFunc(rows, func(a, b requestView) int {
			return cmp.Or(cmp.Compare(key(&a), key(&b)), cmp.Compare(a.id, b.id))
		})
		for _, path := range []string{order, "-" + order} {
			var want, got []string
			for i := range rows {
				want = append(want, formatRequestID(rows[i].id))
			}
			if path != order {
				slices.Reverse(want)
			}
			for next := "/admin/requests?period=30d&limit=200&order=" + path; next != ""; {
				page := b.get(next).body
				ids, _ := parseCallList(page)
				got, next = append(got, ids...), ""
				if m := regexp.MustCompile(`href="([^"]*)" rel="next"`).FindStringSubmatch(page); m != nil {
					next = html.UnescapeString(m[1])
				}
				if !strings.Contains(page, `aria-sort="`) || strings.Contains(page, "Only the latest") {
					t.Errorf("order %s: the page does not show its order, or that it is not of all calls", path)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("order %s: %d calls %.200v, want %d %.200v", path, len(got), got, len(want), want)
			}
		}
	}
	token, err := u.instance.store.tokenByID(t.Context(), u.tokenID)
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxSorted {
		row := &requestRow{id: minIDAt(time.Now()) + int64(i), project: token.project, token: token.seq, model: "m",
			endpoint: "POST /v1/embeddings", outcome: outcomeOK, source: usageNone, status: 200, firstByteUS: -1}
		row.started = time.Now().UnixMilli()
		u.instance.ledger.recordRefused(row, true)
	}
	u.waitSettled()
	page := b.get("/admin/requests?order=-cost").body
	if !strings.Contains(page, "Only the latest 1,000 matching calls are sorted") {
		t.Error("the page does not say that more calls match than it sorts")
	}
	if res := b.get("/admin/requests?order=x"); !strings.Contains(res.body, "There is no such order.") {
		t.Error("an order that does not exist is no problem")
	}
}

// TestFigureLinks: the figures of the dashboard link to exactly the calls that they count.
func TestFigureLinks(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	b := u.signIn(u.adminKey)
	exact := regexp.MustCompile(`<span title="([^"]*)"><span aria-hidden="true">[^<]*</span>` +
		`<span class="hidden">[^<]*</span></span>`)
	page := exact.ReplaceAllString(b.get("/admin/dashboard?period=30d&by=model").body, "$1")
	count := func(path string) (n int) {
		next := regexp.MustCompile(`href="([^"]*)" rel="next"`)
		for path += "&limit=200"; path != ""; {
			res := b.get(path)
			if n += strings.Count(res.body, `<a class="name"`); res.status != 200 {
				t.Fatalf("%s: %d", path, res.status)
			}
			m := next.FindStringSubmatch(res.body)
			if path = ""; m != nil {
				path = html.UnescapeString(m[1])
			}
		}
		return n
	}
	tiles := regexp.MustCompile(`<dt>(\w+)</dt><dd class="big"><a href="([^"]*)">([^<]*)</a></dd>`+
		`<dd class="soft">(?:<a href="([^"]*)">([^<]*)</a>)?`).FindAllStringSubmatch(page, -1)
	if len(tiles) < 4 {
		t.Fatalf("%d tiles have links", len(tiles))
	}
	checked := 0
	for _, m := range tiles {
		for _, link := range [][2]string{{m[2], m[3]}, {m[4], m[5]}} {
			text, _, _ := strings.Cut(strings.ReplaceAll(link[1], ",", ""), " ")
			want, err := strconv.Atoi(text)
			if link[0] == "" || err != nil || m[1] == "Tokens" {
				continue
			}
			checked++
			if got := count(html.UnescapeString(link[0])); got != want {
				t.Errorf("%s: %q leads to %d calls", m[1], link[1], got)
			}
		}
	}
	if checked < 4 {
		t.Errorf("only %d figures were compared: %q", checked, tiles)
	}
	legends := regexp.MustCompile(`</svg><a href="([^"]*cause=[^"]*)">([a-z]+)</a>`).FindAllStringSubmatch(page, -1)
	classes := map[string]int{}
	from := recentFrom(u.now.UnixMilli())
	for _, r := range u.rows {
		if r.started >= from {
			classes[string(r.errorClass())]++
		}
	}
	for _, m := range legends {
		if got := count(html.UnescapeString(m[1])); got != classes[m[2]] {
			t.Errorf("errors of %s: %d calls, want %d", m[2], got, classes[m[2]])
		}
	}
	if len(legends) != 4 {
		t.Errorf("the legend of errors: %q", legends)
	}
	model := regexp.MustCompile(`</svg><a href="(/admin/requests\?[^"]*model=[^"]*)">`)
	legend := model.FindStringSubmatch(page)
	if legend == nil || count(html.UnescapeString(legend[1])) == 0 {
		t.Errorf("the legend does not lead to calls: %q", legend)
	}
	row := regexp.MustCompile(`<th scope="row"><a href="([^"]*)">[^<]*</a></th><td class="num">`)
	step := row.FindStringSubmatch(page)
	if step == nil || count(html.UnescapeString(step[1])) == 0 {
		t.Errorf("a step does not lead to calls: %q", step)
	}
}

// TestObjectPages: the pages of a token and of a project show what it used, what failed, and what was changed; the
// audit trail has names beside ids.
func TestObjectPages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	_, viewer := p.newKey("viewer", "viewer")
	id, token := p.newToken(`"name":"observed","policy":{"models":["gpt-4o-mini"],"limits":[
		{"count":"requests","max":2,"per":"month"}]}`)
	p.chatAs(token)
	p.do("POST", "/v1/chat/completions", `{"model":"gpt-4o","messages":[]}`, "Content-Type", "application/json",
		"Authorization", "Bearer "+token)
	p.manage("PATCH", "/manage/tokens/"+id, `{"name":"renamed"}`, 200, nil)
	p.waitSettled()
	for path, texts := range map[string][]string{
		"/admin/tokens/" + id: {"Usage in the last 30 days", "Calls by model", "Cost by model", "<h2>Models</h2>",
			"Latest failures", "model_not_allowed", "History", "observed → renamed", "token.change"},
		"/admin/projects/" + p.project: {"Latest failures", "model_not_allowed", "History", "project.create"},
		"/admin/audit":                 {"renamed<br>"},
	} {
		res := b.get(path)
		for _, text := range texts {
			if !strings.Contains(res.body, text) {
				t.Errorf("%s lacks %q", path, text)
			}
		}
		if problems := checkHTML(res.body); res.status != 200 || len(problems) > 0 {
			t.Errorf("%s: %d %v", path, res.status, problems)
		}
	}
	v := p.signIn(viewer)
	if res := v.get("/admin/tokens/" + id); res.status != 200 || strings.Contains(res.body, "<h2>History</h2>") {
		t.Errorf("a viewer: %d, or the history is shown", res.status)
	}
}

func TestForecast(t *testing.T) {
	t.Parallel()
	const day = 24 * 3_600_000
	for _, c := range []struct {
		used, limit     float64
		start, end, now int64
		want            int64
	}{
		{used: 50, limit: 100, start: 0, end: 30 * day, now: 10 * day, want: 20 * day},
		{used: 10, limit: 100, start: 0, end: 30 * day, now: 10 * day}, // enough for the month
		{used: 100, limit: 100, start: 0, end: 30 * day, now: 10 * day},
		{used: 0, limit: 100, start: 0, end: 30 * day, now: 10 * day},
		{used: 50, limit: 100, start: 0, end: 30 * day, now: day}, // too early to say
		{used: 50, limit: 100, start: 0, end: 0, now: day},        // it never resets
		{used: 99, limit: 100, start: 0, end: day, now: day - 1},
	} {
		if got := forecast(c.used, c.limit, c.start, c.end, c.now); got != c.want {
			t.Errorf("%+v: got %d", c, got)
		}
	}
	l := limit{metric: metricRequests, max: 100, period: perMonth}
	bars := []barView{{limitView: limitView{limit: &l, Used: []byte("90"), Max: []byte("100")}}}
	forecastLimits(bars, time.Date(2026, 11, 15, 0, 0, 0, 0, time.UTC))
	if at := bars[0].UsedUpAt; at == nil || time.UnixMilli(int64(*at)).UTC().Format(time.DateOnly) != "2026-11-16" {
		t.Errorf("a month's limit: %v", at)
	}
}

// TestListsHostile: no text in an address and no forged position makes a list fail, and what /manage gives as the next
// position can be used.
func TestListsHostile(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	p.chat()
	p.waitSettled()
	hook := p.newHook(t, formatStandard, `,"is_active":false`)
	const last = "1y2p0ij32e8e7" // the largest seq in a position
	texts := []string{"a\x00b", "ab\xffc", `"""`, "%_*'", "NEAR(", "\u0130", "\u200b\u200b\u200b", "team=$", "-1"}
	positions := []string{last + ".", last + "." + last, last + "." + last + "%2C" + last, "1.%00", "1.-1", "-1."}
	for _, list := range []struct {
		path   string
		params string
	}{
		{"/manage/tokens", "search name project_id active limit after"},
		{"/manage/tokens?search=%C3%89", "after name"},
		{"/manage/tokens?name=a", "after"},
		{"/manage/projects", "search name limit after"},
		{"/manage/requests", "search session end_user tag outcome cache token_id project_id from after"},
		{"/manage/sessions?session=s", "session project_id after"},
		{"/manage/audit", "actor action object after"},
		{"/manage/prices/list", "search provider after"},
		{hook.path + "/deliveries", "state after limit"},
		{"/manage/usage?group_by=end_user", "top project_id token_id interval"},
		{"/manage/projects/" + p.project, "limit_value limit_values"},
		{"/admin/tokens", "search name project_id state order after before limit"},
		{"/admin/tokens?search=%C3%89", "after before order"},
		{"/admin/tokens?order=cost", "after before"},
		{"/admin/tokens?order=-name", "after before"},
		{"/admin/tokens?order=ends&state=active", "after before"},
		{"/admin/tokens?state=revoked", "after before"},
		{"/admin/projects", "search order after before"},
		{"/admin/requests", "search session end_user tag model endpoint outcome status after before order"},
		{"/admin/session", "session project_id after"},
		{"/admin/audit", "actor action object after before"},
		{strings.Replace(hook.path, "/manage", "/admin", 1), "after"},
	} {
		for name := range strings.FieldsSeq(list.params) {
			values := texts
			if name == "after" || name == "before" {
				values = slices.Concat(texts, positions)
			}
			for _, value := range values {
				path := list.path + "?" + name + "=" + url.QueryEscape(value)
				if strings.Contains(list.path, "?") {
					path = list.path + "&" + name + "=" + url.QueryEscape(value)
				}
				var res testResponse
				if strings.HasPrefix(path, "/manage") {
					res = p.manageAs(p.adminKey, "GET", path, "")
				} else {
					res = b.get(path)
				}
				if res.status >= 500 || res.status == 401 || res.status == 403 {
					t.Errorf("%s: got %d %.200s", path, res.status, res.body)
				}
				var page struct{ Next string }
				if json.Unmarshal([]byte(res.body), &page) == nil && page.Next != "" {
					if _, _, err := parseCursor(page.Next); err != nil {
						t.Errorf("%s: the next position is %q", path, page.Next)
					}
				}
			}
		}
	}
}
