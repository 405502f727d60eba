// Tests of the list of calls, the page of one call, and downloads.
package main

import (
	"encoding/csv"
	"encoding/json"
	"html"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

var callLinkPattern = regexp.MustCompile(`href="/admin/requests/(req_[0-9a-z]{13})"`)

// parseCallList returns the ids of the calls on a page of the list, and the address of the next page.
func parseCallList(page string) (ids []string, next string) {
	for _, m := range callLinkPattern.FindAllStringSubmatch(page, -1) {
		ids = append(ids, m[1])
	}
	if m := regexp.MustCompile(`href="(/admin/requests\?[^"]*)" rel="next"`).FindStringSubmatch(page); m != nil {
		next = html.UnescapeString(m[1])
	}
	return ids, next
}

// TestRequestsPage: all filters apply together; the pages list every match once, newest first.
func TestRequestsPage(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	b := u.signIn(u.adminKey)
	from := u.now.Add(-40 * time.Hour).UTC().Truncate(time.Minute)
	to := u.now.Add(-2 * time.Hour).UTC().Truncate(time.Minute)
	first := u.rows[0]
	all := func(*requestRow) bool { return true }
	none := func(*requestRow) bool { return false }
	inTime := func(r *requestRow) bool { return r.started >= from.UnixMilli() && r.started < to.UnixMilli() }
	since := func(r *requestRow) bool { return r.started >= from.UnixMilli() }
	ofProject := func(r *requestRow) bool { return r.project == first.project }
	ofToken := func(r *requestRow) bool { return r.token == first.token }
	ofSecond := func(r *requestRow) bool { return u.projects[r.project] != u.project }
	second := "of " + u.projects[u.rows[slices.IndexFunc(u.rows, ofSecond)].project] // the name of its token
	for query, keep := range map[string]func(*requestRow) bool{
		"": all,
		"from=" + from.Format("2006-01-02T15:04") + "&to=" + to.Format("2006-01-02T15:04"): inTime,
		"from=" + url.QueryEscape(from.Format(time.RFC3339)):                               since,
		"project=" + u.projects[first.project]:                                             ofProject,
		"token=" + u.tokens[first.token]:                                                   ofToken,
		"token=" + u.tokens[first.token] + "&project=proj_none":                            none,
		"token=" + url.QueryEscape(second):                                                 ofSecond,
		"token=" + url.QueryEscape(second[:len(second)-2]):                                 ofSecond,
		"model=" + url.QueryEscape("GPT*"): func(r *requestRow) bool {
			return strings.HasPrefix(r.model, "gpt")
		},
		"model=" + url.QueryEscape("*T-4*"): func(r *requestRow) bool { return r.model == "gpt-4o" },
		"model=" + url.QueryEscape("*_*"):   none,
		"model=gpt-5&outcome=client_gone": func(r *requestRow) bool {
			return r.model == "gpt-5" && r.outcome == outcomeClientGone
		},
		"outcome=ok&project=" + u.projects[first.project]: func(r *requestRow) bool {
			return r.outcome == outcomeOK && ofProject(r)
		},
		"endpoint=" + url.QueryEscape("POST /v1/embeddings"): func(r *requestRow) bool {
			return r.endpoint == "POST /v1/embeddings"
		},
		"status=200":              all,
		"status=2xx&model=gpt-4o": func(r *requestRow) bool { return r.model == "gpt-4o" },
		"status=5xx":              none,
		"token=tok_none":          none,
		"model=" + url.QueryEscape("' OR 1=1 --"):                     none,
		"from=&to=&project=&token=&model=&endpoint=&status=&outcome=": all,
	} {
		var want []*requestRow
		for _, r := range u.rows {
			if keep(r) {
				want = append(want, r)
			}
		}
		slices.SortFunc(want, func(a, b *requestRow) int { return int(min(1, max(-1, b.id-a.id))) })
		path := "/admin/requests?" + query
		for pages := 0; path != "" && pages < 20; pages++ {
			res := b.get(path)
			var ids []string
			ids, path = parseCallList(res.body)
			if res.status != 200 || len(ids) > len(want) || len(want) > 0 && len(ids) == 0 {
				t.Fatalf("%s: %d, %d calls of %d", query, res.status, len(ids), len(want))
			}
			for i, id := range ids {
				if id != formatRequestID(want[i].id) {
					t.Fatalf("%s: page %d has %s at %d, want %s", query, pages, id, i, formatRequestID(want[i].id))
				}
			}
			want = want[len(ids):]
		}
		if len(want) > 0 {
			t.Errorf("%s: %d calls are missing", query, len(want))
		}
	}
	for query, text := range map[string]string{"from=yesterday": "must be a time",
		"to=9999-01-01T00:00": "must be a time", "from=2026-01-02T00:00&to=2026-01-01T00:00": "must be before",
		"status=abc": "such as 429", "status=9xx": "such as 429", "status=99": "such as 429",
		"outcome=good": "no such outcome", "id=abc": "looks like req_", "token=nobody": "No token has this ID",
		"token=" + url.QueryEscape("%"):             "No token has this ID",
		"token=" + url.QueryEscape("of "+u.project): "Several tokens match",
		"model=" + strings.Repeat("x", 600):         "longer than"} {
		res := b.get("/admin/requests?" + query)
		_, value, _ := strings.Cut(query, "=")
		if value, _ = url.QueryUnescape(value); res.status != 200 || !strings.Contains(res.body, text) ||
			!strings.Contains(res.body, `role="alert"`) ||
			len(value) < 20 && !strings.HasPrefix(query, "outcome") &&
				!strings.Contains(res.body, `value="`+value+`"`) {
			t.Errorf("%s: %d, without %q or the input", clip(query, 60), res.status, text)
		}
	}
	for path, status := range map[string]int{"/admin/requests?after=x": 400, "/admin/requests?id=" +
		formatRequestID(first.id): 303,
		"/admin/requests/req_0000000000001": 404, "/admin/requests/nonsense": 404} {
		if res := b.get(path); res.status != status {
			t.Errorf("%s: %d", path, res.status)
		}
	}
}

// TestRequestsFiltered: with a filter that few calls match, a page scans a bounded number of calls,
// says so, and the next page continues there; no call is missed.
func TestRequestsFiltered(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	b := u.signIn(u.adminKey)
	rare := *u.rows[0]
	rare.model = "rare"
	at := u.now.Add(-80 * 24 * time.Hour)
	rare.id, rare.started = minIDAt(at), at.UnixMilli()
	records := []*requestRow{&rare}
	for i := range maxScannedRequests + 100 {
		r := *u.rows[0]
		at := u.now.Add(-75 * 24 * time.Hour).Add(time.Duration(i) * time.Second)
		r.id, r.started = minIDAt(at), at.UnixMilli()
		records = append(records, &r)
	}
	w := u.instance.store.newLedgerWriter()
	defer w.close()
	for part := range slices.Chunk(records, 5000) {
		if err := w.write(t.Context(), ledgerBatch{records: part}); err != nil {
			t.Fatal(err)
		}
	}
	for _, scope := range []string{"", "&project=" + u.projects[rare.project], "&token=" + u.tokens[rare.token]} {
		path, pages, found := "/admin/requests?model=rare"+scope, 0, []string{}
		for ; path != "" && pages < 5; pages++ {
			res := b.get(path)
			var ids []string
			ids, path = parseCallList(res.body)
			found = append(found, ids...)
			if path != "" && !strings.Contains(res.body, "Continue searching") {
				t.Errorf("%s: page %d does not say that it is partial", scope, pages)
			}
		}
		if pages != 2 || !slices.Equal(found, []string{formatRequestID(rare.id)}) {
			t.Errorf("%s: %v on %d pages", scope, found, pages)
		}
	}
	var l struct {
		Data []requestEntry
		Next string
	}
	u.manage("GET", "/manage/requests?outcome=lost", "", 200, &l)
	if len(l.Data) != 0 || l.Next == "" {
		t.Errorf("/manage: %d calls, next %q", len(l.Data), l.Next)
	}
}

// TestRequestPage: the page of a call shows its numbers, whatever its outcome.
func TestRequestPage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	if res := b.get("/admin/requests"); !strings.Contains(res.body, "No calls yet") {
		t.Error("the page of an empty ledger does not say so")
	}
	if res := p.chat(); res.status != 200 {
		t.Fatal(res.status)
	}
	row := p.lastCall()
	res := b.get("/admin/requests/" + row.ID)
	for _, text := range []string{row.ID, "chat/completions", "gpt-4o-mini", `<svg class="span"`, "to the first byte",
		"As reported in the provider", "/admin/tokens/" + p.tokenID, "/admin/projects/" + p.project, "127.0.0.1"} {
		if res.status != 200 || !strings.Contains(res.body, text) {
			t.Errorf("%d: %q is not on the page: %s", res.status, text, res.body)
		}
	}
	token, err := p.instance.store.tokenByID(t.Context(), p.tokenID)
	if err != nil {
		t.Fatal(err)
	}
	attempts := `[{"upstream_id":"up_1","model":"m","status":503,"ms":3},{"upstream_id":"up_2","model":"m","ms":4}]`
	for i, o := range allOutcomes() {
		r := &requestRow{id: minIDAt(time.Now()) + int64(i)<<5 + 1, project: token.project, token: token.seq,
			endpoint: "POST /v1/chat/completions", model: "", outcome: o,
			source: usageNone, firstByteUS: -1, totalUS: int64(i), errorCode: "code_" +
				string(o), attempts: i, attemptLog: attempts}
		p.instance.ledger.recordRefused(r, true)
		p.waitSettled()
		res := b.get("/admin/requests/" + formatRequestID(r.id))
		if res.status != 200 || !strings.Contains(res.body, "code_"+string(o)) || !strings.Contains(res.body, "up_2") {
			t.Errorf("%s: %d %s", o, res.status, res.body)
		}
	}
}

// TestRequestsPeriod: the list of calls takes the periods of the dashboard, and so does its download.
func TestRequestsPeriod(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	token, err := p.instance.store.tokenByID(t.Context(), p.tokenID)
	if err != nil {
		t.Fatal(err)
	}
	for _, ago := range []time.Duration{time.Minute, 5 * 24 * time.Hour, 80 * 24 * time.Hour} {
		p.instance.ledger.recordRefused(&requestRow{id: minIDAt(time.Now().Add(-ago)), project: token.project,
			token: token.seq, endpoint: "POST /v1/chat/completions", outcome: outcomeOK, source: usageNone,
			firstByteUS: -1, started: time.Now().Add(-ago).UnixMilli()}, true)
	}
	p.waitSettled()
	day := time.Now().UTC().AddDate(0, 0, -6).Format("2006-01-02T15:04")
	for query, want := range map[string]int{"": 3, "period=": 3, "period=24h": 1, "period=7d": 2, "period=30d": 2,
		"period=90d": 3, "period=24h&from=" + day: 2, "period=90d&outcome=refused": 0} {
		if ids, _ := parseCallList(b.get("/admin/requests?" + query).body); len(ids) != want {
			t.Errorf("%s lists %q, want %d", query, ids, want)
		}
		form, err := url.ParseQuery(query + "&format=jsonl")
		if err != nil {
			t.Fatal(err)
		}
		if res := b.post("/admin/requests/export", form); strings.Count(res.body, "\n") != want {
			t.Errorf("the download of %s has %q, want %d", query, res.body, want)
		}
	}
	if page := b.get("/admin/requests?period=1y").body; !strings.Contains(page, "There is no such period.") {
		t.Error("an unknown period is not an error")
	}
}

// TestEndedCallsAreListed: a call that has ended is nowhere listed as running, even right after its end. Its outcome
// has the same words on every page.
func TestEndedCallsAreListed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	p.chat()
	for _, path := range []string{"/admin/requests", "/admin/tokens/" + p.tokenID} {
		for range 3 {
			p.chat()
			waitFor(t, "the call's end", func() bool { return p.instance.running.count() == 0 })
			if page := b.get(path).body; strings.Contains(page, ">running</span>") ||
				!strings.Contains(page, ">ok</span> 200") {
				t.Errorf("%s: %s", path, pageText(t, page))
			}
		}
	}
	token, err := p.instance.store.tokenByID(t.Context(), p.tokenID)
	if err != nil {
		t.Fatal(err)
	}
	row := &requestRow{id: minIDAt(time.Now()) + 1, project: token.project, token: token.seq,
		endpoint: "POST /v1/chat/completions", outcome: outcomeClientGone, source: usageNone, firstByteUS: -1}
	p.instance.ledger.recordRefused(row, true)
	p.waitSettled()
	for _, path := range []string{"/admin/requests", "/admin/tokens/" + p.tokenID,
		"/admin/requests/" + formatRequestID(row.id)} {
		if page := pageText(t, b.get(path).body); !strings.Contains(page, "client disconnected") ||
			strings.Contains(page, "client_gone") || strings.Contains(page, "disconnected 0") {
			t.Errorf("%s: %s", path, page)
		}
	}
}

// pageText returns the text of a page with single spaces between its parts.
func pageText(t *testing.T, page string) string {
	t.Helper()
	text := regexp.MustCompile(`<[^>]*>`).ReplaceAllString(page, " ")
	return strings.Join(strings.Fields(html.UnescapeString(text)), " ")
}

// TestRequestPageCost: the page of a call says what its cost is made of, at which price, in which tier and with which
// multiplier.
func TestRequestPageCost(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	check := func(wants ...string) {
		t.Helper()
		res := b.get("/admin/requests/" + p.lastCall().ID)
		text := pageText(t, res.body)
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("%q is not on the page: %s", want, text)
			}
		}
		if problems := checkHTML(res.body); res.status != 200 || len(problems) > 0 {
			t.Errorf("%d %v", res.status, problems)
		}
	}
	usage := func(usage string) {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			return c.reply(200, `{"id":"c","object":"chat.completion","model":"gpt-4o-mini-2024-07-18",`+usage+`}`)
		})
	}
	usage(`"choices":[],"usage":{"prompt_tokens":2000,"completion_tokens":10,
		"prompt_tokens_details":{"cached_tokens":1200}}`)
	p.chat()
	check("1,200 cached input × $0.075/M = $0.00009", "800 input × $0.15/M = $0.00012",
		"10 output × $0.60/M = $0.000006", "Total $0.000216",
		"List price of gpt-4o-mini-2024-07-18 (openai), as of 20")
	var price struct{ ID string }
	p.manage("POST", "/manage/prices", `{"match":"gpt-4o-mini*","input":1000,"output":"0.5",
		"service_tier":{"priority":{"input":2000,"output":1}}}`, 201, &price)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"cost_multiplier":0.8}`, 200, nil)
	usage(`"service_tier":"priority","choices":[],"usage":{"prompt_tokens":1000,"completion_tokens":0}`)
	p.chat()
	check("1,000 input × $2,000.00/M = $2.00", "Cost multiplier × 0.8 = −$0.40", "Total $1.60",
		"Your own price for gpt-4o-mini*", "Service tier priority")
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(500, "{}") })
	p.chat()
	if res := b.get("/admin/requests/" + p.lastCall().ID); strings.Contains(res.body, "What the cost is made of") {
		t.Error("a call without a cost has a table of its parts")
	}
}

// TestExports: a download has every call that matches the filters and no formulas, and none starts
// without an audit entry.
func TestExports(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	_, key := u.newKey("reads only", "viewer")
	b := u.signIn(key)
	var evil struct{ ID string }
	u.manage("POST", "/manage/tokens", `{"project_id":"`+u.project+`","name":"=cmd|' /C calc'!A0"}`, 201, &evil)
	row, err := u.instance.store.tokenByID(t.Context(), evil.ID)
	if err != nil {
		t.Fatal(err)
	}
	for i, model := range []string{"=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\"quoted\", \nand more", "<b>",
		"plain"} {
		r := *u.rows[0]
		at := u.now.Add(-time.Duration(i) * time.Second)
		r.id, r.started, r.token, r.model, r.project = minIDAt(at), at.UnixMilli(), row.seq, model, row.project
		u.rows = append(u.rows, &r)
		u.instance.ledger.recordRefused(&r, true)
	}
	u.waitSettled()
	res := b.post("/admin/requests/export", url.Values{"format": {"csv"}})
	records, err := csv.NewReader(strings.NewReader(res.body)).ReadAll()
	if err != nil || res.status != 200 || len(records) != len(u.rows)+1 ||
		!strings.HasPrefix(res.header.Get("Content-Disposition"), `attachment; filename="llm-proxy-calls-`) ||
		!strings.HasPrefix(res.header.Get("Content-Type"), "text/csv") {
		t.Fatalf("%d %v: %d lines, want %d; %v", res.status, err, len(records), len(u.rows)+1, res.header)
	}
	models := map[string]int{}
	for _, line := range records {
		for i, cell := range line {
			if cell != "" && strings.ContainsAny(cell[:1], "=+-@\t\r\n") {
				t.Errorf("a cell of %s may be a formula: %q", records[0][i], cell)
			}
		}
		models[line[slices.Index(records[0], "model")]]++
	}
	if models["'=1+1"] != 1 || models["plain"] != 1 ||
		records[1][slices.Index(records[0], "token_name")] != "'=cmd|' /C calc'!A0" {
		t.Error(models, records[1])
	}
	res = b.post("/admin/requests/export", url.Values{"format": {"jsonl"}, "token": {evil.ID}, "model": {"@SUM(A1)"}})
	var line struct{ Model, ID, TokenName string }
	if err := json.Unmarshal([]byte(res.body), &line); err != nil || line.Model != "@SUM(A1)" ||
		strings.Count(res.body, "\n") != 1 {
		t.Errorf("%v: %s", err, res.body)
	}
	res = b.post("/admin/dashboard/export",
		url.Values{"period": {"90d"}, "project": {""}, "by": {"model"}, "measure": {"cost"}})
	if records, err = csv.NewReader(strings.NewReader(res.body)).ReadAll(); err != nil || res.status != 200 ||
		len(records) < 95 {
		t.Errorf("the dashboard: %d, %v, %d lines", res.status, err, len(records))
	}
	var trail struct {
		Data []struct {
			Action, Object string
			Detail         map[string]string
		}
	}
	u.manage("GET", "/manage/audit?action=export", "", 200, &trail)
	if len(trail.Data) != 3 || trail.Data[0].Object != "dashboard" || trail.Data[1].Object != "requests" ||
		trail.Data[1].Detail["token"] != evil.ID || trail.Data[2].Detail["format"] != "csv" {
		t.Errorf("the audit trail has %+v", trail.Data)
	}
	for path, form := range map[string]url.Values{"/admin/requests/export": {"format": {"xlsx"}},
		"/admin/requests/export?x": {"format": {"csv"},
			"status": {"x"}}, "/admin/dashboard/export": {"period": {"x"}}} {
		if res := b.post(path, form); res.status != 400 {
			t.Errorf("%s %v: %d", path, form, res.status)
		}
	}
	for _, path := range []string{"/admin/requests/export", "/admin/dashboard/export"} {
		if res := b.get(path); res.status != 405 && res.status != 404 {
			t.Errorf("GET %s: %d", path, res.status)
		}
	}
	u.allowErrors = true // from the trigger below
	trigger := `CREATE TRIGGER no_audit BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END`
	u.execSQL(trigger)
	for _, path := range []string{"/admin/requests/export", "/admin/dashboard/export"} {
		if res := b.post(path, url.Values{"format": {"csv"}}); res.status < 500 || strings.Contains(res.body, "req_") &&
			strings.Contains(res.body, "gpt-") {
			t.Errorf("%s without an audit trail: %d %s", path, res.status, clip(res.body, 200))
		}
	}
}

// TestSafeCells: a cell that a spreadsheet would take for a formula becomes text.
func TestSafeCells(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{"": "", "a=1": "a=1", "=1": "'=1", "+1": "'+1", "-1": "'-1", "@x": "'@x",
		"\tx": "'\tx", "\rx": "'\rx", "\nx": "'\nx", "'x": "'x", "ä": "ä",
		"＝1": "'＝1", "＋1": "'＋1", "－1": "'－1", "＠x": "'＠x", "﹦1": "'﹦1", "\u200b=1": "'\u200b=1", " =1": "' =1",
		"\ufeff＝1": "'\ufeff＝1", "\x00=1": "'\x00=1", " ": " ", "\xff": "\xff", "a＝": "a＝", "ｘ": "ｘ"} {
		if got := safeCell(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}

// TestRefusalPage: the page of a refused call has the text that the client got, what is allowed, and a link to the
// rule.
func TestRefusalPage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	_, viewerKey := p.newKey("v", "viewer")
	viewer := p.signIn(viewerKey)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"endpoints":["/v1/chat/*"]}}`, 200, nil)
	project := "/admin/projects/" + p.project
	var first, told, token string
	for _, c := range []struct {
		limits, model, path string
		answered            int    // calls before the one that is refused
		change, allowed     string // the link to the rule, from the token's page on unless it is the project's
	}{
		{`"policy":{"models":["gpt-4o*"]}`, "o3", "/v1/chat/completions", 0, "/edit#f-policy-models",
			"Token limited: models allowed now gpt-4o*"},
		{`"max_requests":9`, "m", "/v1/embeddings", 0, project + "/edit#f-policy-endpoints",
			"Project test: endpoints allowed now /v1/chat/*"},
		{`"policy":{"limits":[{"count":"requests","max":1,"per":"day","model":"gpt-4o"}]}`, "gpt-4o",
			"/v1/chat/completions", 1, "/edit#limits", "1 request per day for models gpt-4o"},
		{`"max_requests":2`, "gpt-4o", "/v1/chat/completions", 2, "/edit#f-max_requests", "2 requests in total"},
	} {
		id, value := p.newToken(`"name":"limited",` + c.limits)
		if !strings.HasPrefix(c.change, project) {
			c.change = "/admin/tokens/" + id + c.change
		}
		send := func() testResponse {
			body := `{"model":"` + c.model + `","input":"x","messages":[{"role":"user","content":"Hello"}]}`
			return p.do("POST", c.path, body, "Authorization", "Bearer "+value, "Content-Type", "application/json")
		}
		for range c.answered {
			if res := send(); res.status != 200 {
				t.Fatalf("%+v: %d %s", c, res.status, res.body)
			}
		}
		res := send()
		p.waitSettled()
		var e struct{ Error struct{ Message string } }
		if err := json.Unmarshal([]byte(res.body), &e); err != nil || res.status < 400 {
			t.Fatalf("%+v: %d %s", c, res.status, res.body)
		}
		page := b.get("/admin/requests/" + p.lastCall().ID)
		text := pageText(t, page.body)
		if !strings.Contains(text, "The client received: "+e.Error.Message) || !strings.Contains(text, c.allowed) ||
			!strings.Contains(page.body, `href="`+c.change+`"`) || len(checkHTML(page.body)) > 0 {
			t.Errorf("%+v: %v\n%s\n%s", c, checkHTML(page.body), e.Error.Message, text)
		}
		link, field, _ := strings.Cut(c.change, "#")
		if form := b.get(link).body; !strings.Contains(form, `id="`+field+`"`) {
			t.Errorf("%s has no %s", link, field)
		}
		if page := viewer.get("/admin/requests/" + p.lastCall().ID).body; strings.Contains(page, "Change the rule") ||
			!strings.Contains(pageText(t, page), e.Error.Message) {
			t.Error("a viewer sees a link that a viewer may not use, or no text")
		}
		if first == "" {
			first, told, token = p.lastCall().ID, e.Error.Message, id
		}
	}
	p.manage("PATCH", "/manage/tokens/"+token, `{"policy":{}}`, 200, nil)
	if page := b.get("/admin/requests/" + first).body; !strings.Contains(page, "such a call is allowed now") ||
		strings.Contains(page, "Change the rule") || !strings.Contains(pageText(t, page), told) {
		t.Errorf("after a change: %s", pageText(t, page))
	}
	if page := b.get("/admin/requests/" + p.sendOK(t)).body; strings.Contains(page, "Why it was refused") {
		t.Error("a call that was answered was refused")
	}
}

// sendOK makes a call that is answered, and returns its id.
func (p *testProxy) sendOK(t *testing.T) string {
	t.Helper()
	if res := p.chat(); res.status != 200 {
		t.Fatal(res.status, res.body)
	}
	return p.lastCall().ID
}
