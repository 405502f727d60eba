// Tests of attribution: what is read of headers and bodies, what policies ask for, how end users are recorded, and that
// a call that dies keeps what it has said. testdata/calls/attribution_*.txt has one call of each kind.
package main

import (
	"errors"
	"fmt"
	"html"
	"math"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// describe shows an attribution for comparisons.
func (a *attribution) describe() string {
	session, endUser, tags := a.columns()
	return session + "|" + endUser + "|" + tags
}

func (e *requestEntry) attributed() string {
	return (&attribution{e.Session, e.EndUser, e.Tags}).describe()
}

// TestAttributionValues: what clients send is recorded if it is text that can be shown. The proxy's own headers
// must be right, and none of them is forwarded.
func TestAttributionValues(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"attribution":{"tags":["team","task","x"]}}}`, 200,
		nil)
	_, fixed := p.newToken(`"policy":{"attribution":{"fixed_tags":{"team":"search","unit":"7"}}}`)
	long := strings.Repeat("a", maxAttributionLen)
	claude := `"user":` + quote(`{"device_id":"dev","account_uuid":"acc","session_id":"s"}`)
	for _, c := range []struct {
		name    string
		headers string // "Name: value" lines
		members string // of the body
		want    string // what is recorded, or the code of the error and a part of its text
	}{
		{"nothing", "", `"a":1`, "||"},
		{"the order of headers", "Conversation_id: 6|Session_id: 5|Session-Id: 4|X-Claude-Code-Session-Id: 3",
			`"prompt_cache_key":"7"`, "3||"},
		{"the proxy's own first", "X-LLM-Proxy-Session: 1|X-LLM-Proxy-End-User: me|Session-Id: 4", `"user":"you"`,
			"1|me|"},
		{"the order of fields", "", `"safety_identifier":"s","user":"u"`, "|u|"},
		{"the second field", "", `"safety_identifier":"s","user":7`, "|s|"},
		{"the last of two", "", `"user":"a","user":"b"`, "|b|"},
		{"another case", "", `"User":"a"`, "||"},
		{"null", "", `"user":null,"prompt_cache_key":null`, "||"},
		{"no string", "", `"user":{"id":"a"},"prompt_cache_key":["a"]`, "||"},
		{"escapes", "", `"us\u0065r":"\u00e4\"\\"`, `|ä"\|`},
		{"half a surrogate", "", `"user":"a\ud800"`, "||"},
		{"a control character", "", `"user":"a\u0000b","prompt_cache_key":"a\nb"`, "||"},
		{"text from right to left", "", `"user":"a\u202eb"`, "||"},
		{"empty", "Session-Id: ", `"user":""`, "||"},
		{"the longest", "", `"user":"` + long + `"`, "|" + long + "|"},
		{"too long", "Session-Id: a" + long, `"user":"a` + long + `","prompt_cache_key":"p"`, "p||"},
		{"a megabyte", "", `"user":"` + strings.Repeat("a", 1<<20) + `"`, "||"},
		{"metadata is Anthropic's", "", `"metadata":{"user_id":"a"}`, "||"},
		{"Claude Code through a translator", "", claude, "s|acc|"},
		{"JSON without the names", "", `"user":` + quote(`{"a":"b"}`), `|{"a":"b"}|`},
		{"an old form that is none", "", `"user":"user_1_session_2"`, "|user_1_session_2|"},
		{"tags", "X-LLM-Proxy-Tags: team=search,task=a/b:c@d+e_f.g-h", "",
			`||{"task":"a/b:c@d+e_f.g-h","team":"search"}`},
		{"tags in two lines", "X-LLM-Proxy-Tags: team=a|X-LLM-Proxy-Tags: task=b", "", `||{"task":"b","team":"a"}`},
		{"no tag", "X-LLM-Proxy-Tags: ", "", "invalid_tags: without '='"},
		{"a tag without a value", "X-LLM-Proxy-Tags: team=", "", "invalid_tags: as the value of \"team\""},
		{"a tag that is malformed", "X-LLM-Proxy-Tags: team", "", "invalid_tags: must be a list such as"},
		{"an end without a tag", "X-LLM-Proxy-Tags: team=a,", "", "invalid_tags: must be a list such as"},
		{"a key that is not allowed", "X-LLM-Proxy-Tags: Team=a", "",
			"invalid_tags: \"Team\", which the project's policy does not allow. It allows: team, task, x."},
		{"a key of bytes", "X-LLM-Proxy-Tags: \xff\xe2\x80\xae=a", "", "invalid_tags: which the project's policy"},
		{"a key twice", "X-LLM-Proxy-Tags: team=a,team=a", "", "invalid_tags: the key \"team\" twice"},
		{"a blank in a value", "X-LLM-Proxy-Tags: team=a b", "", "invalid_tags: 1 to 64 letters"},
		{"a second =", "X-LLM-Proxy-Tags: team=a=b", "", "invalid_tags: 1 to 64 letters"},
		{"a long value", "X-LLM-Proxy-Tags: team=" + strings.Repeat("a", 65), "", "invalid_tags: 1 to 64 letters"},
		{"an own header twice", "X-LLM-Proxy-Session: a|X-LLM-Proxy-Session: b", "", "invalid_attribution: once"},
		{"an own header too long", "X-LLM-Proxy-End-User: a" + long, "", "invalid_attribution: once"},
		{"an own header of bytes", "X-LLM-Proxy-End-User: \xff", "", "invalid_attribution: once"},
		{"own tags", "fixed|X-LLM-Proxy-Tags: task=b", "", `||{"task":"b","team":"search","unit":"7"}`},
		{"own tags, sent as well", "fixed|X-LLM-Proxy-Tags: unit=7,team=search", "", `||{"team":"search","unit":"7"}`},
		{"own tags, changed", "fixed|X-LLM-Proxy-Tags: team=b", "", "invalid_tags: must not change \"team\""},
	} {
		token, headers := p.token, []string{"Content-Type", "application/json"}
		for line := range strings.SplitSeq(c.headers, "|") {
			if name, value, ok := strings.Cut(line, ": "); ok {
				headers = append(headers, name, value)
			} else if line == "fixed" {
				token = fixed
			}
		}
		members := `"b":2`
		if c.members != "" {
			members = c.members
		}
		headers = append(headers, "Authorization", "Bearer "+token)
		res := p.do("POST", "/v1/chat/completions", chatBody(members), headers...)
		if code, text, isError := strings.Cut(c.want, ": "); isError && res.status != 200 {
			message := strings.ReplaceAll(res.body, `\"`, `"`)
			if res.status != 400 || res.errorCode() != code || !strings.Contains(message, text) {
				t.Errorf("%s: got %d %s", c.name, res.status, res.body)
			}
			continue
		}
		if row := p.lastCall(); res.status != 200 || row.attributed() != c.want {
			t.Errorf("%s: got %d and %s, want %s", c.name, res.status, row.attributed(), c.want)
		}
	}
	for _, r := range p.provider.received() {
		for name := range r.header {
			if strings.HasPrefix(name, "X-Llm-Proxy") {
				t.Errorf("the provider got the header %s", name)
			}
		}
	}
}

// TestAttributionTooManyTags: a call has 8 tags at most, those of its token included.
func TestAttributionTooManyTags(t *testing.T) {
	t.Parallel()
	project := &attributionPolicy{}
	var sent []string
	for i := range maxTags {
		project.Tags = append(project.Tags, fmt.Sprint("k", i))
		sent = append(sent, fmt.Sprintf("k%d=%d", i, i))
	}
	token := &attributionPolicy{FixedTags: tagList{{"z", "1"}}}
	if tags, err := readTags([]string{strings.Join(sent, ",")}, project, nil); len(tags) != maxTags || err != nil {
		t.Errorf("got %v, %v", tags, err)
	}
	tags, err := readTags([]string{strings.Join(sent, ",")}, project, token)
	if err == nil || !strings.Contains(asAPIError(err).msg, "too many keys") || len(tags) != 1 {
		t.Errorf("got %v, %v", tags, err)
	}
}

// TestAttributionPolicy: what a policy may say.
func TestAttributionPolicy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ policy, want string }{ // want: the field at fault, "" for none
		{`{}`, ""},
		{`{"tags":["a","a-b_9"],"required":["end_user","session","tag:a"],"end_users":"hashed"}`, ""},
		{`{"tags":["A"]}`, "tags"}, {`{"tags":["a","a"]}`, "tags"}, {`{"tags":[""]}`, "tags"},
		{`{"tags":["9a"]}`, "tags"}, {`{"tags":"a"}`, "tags"}, {`{"tags":["` + strings.Repeat("a", 33) + `"]}`, "tags"},
		{`{"tags":[` + strings.Repeat(`"a",`, 50) + `"a"]}`, "tags"},
		{`{"required":["user"]}`, "required"}, {`{"required":["session","session"]}`, "required"},
		{`{"required":["tag:a"]}`, "required"}, {`{"required":["tag:"]}`, "required"},
		{`{"required":["end_user"],"end_users":"off"}`, "required"},
		{`{"end_users":"secret"}`, "end_users"}, {`{"fixed_tags":{"a":"b"}}`, "fixed_tags"}, {`{"tag":["a"]}`, "tag"},
		{`token{"required":["tag:a"],"fixed_tags":{"b":"c"}}`, ""}, {`token{"tags":["a"]}`, "tags"},
		{`token{"fixed_tags":{"B":"c"}}`, "fixed_tags"}, {`token{"fixed_tags":{"b":"c d"}}`, "fixed_tags"},
		{`token{"fixed_tags":{"b":""}}`, "fixed_tags"}, {`token{"fixed_tags":["b"]}`, "fixed_tags"},
		{`token{"end_users":"off"}`, "end_users"}, {`[]`, ""},
	} {
		text, ofToken := strings.CutPrefix(c.policy, "token")
		p, err := parsePolicy([]byte(`{"attribution":`+text+`}`), !ofToken)
		got := ""
		if fe, ok := errors.AsType[*fieldError](err); ok {
			got = strings.TrimPrefix(strings.TrimPrefix(fe.param, "policy.attribution"), ".")
		}
		if text == "[]" {
			if err == nil {
				t.Errorf("%s is accepted", c.policy)
			}
			continue
		}
		if got != c.want || (err != nil) != (c.want != "") {
			t.Errorf("%s: got %v", c.policy, err)
		}
		if again, againErr := parsePolicy([]byte(p.String()), !ofToken); err == nil &&
			(againErr != nil || again.String() != p.String()) {
			t.Errorf("%s is written as %s, which is read as %s, %v", c.policy, p, again, againErr)
		}
	}
}

// TestAttributionNarrowed: a restored policy asks for all that both policies ask for, and can be read.
func TestAttributionNarrowed(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ backup, current, want string }{
		{`{"tags":["a","b"],"required":["tag:a","session"]}`, `{"tags":["b","c"],"required":["end_user"]}`,
			`{"tags":["b"],"required":["end_user","session"]}`},
		{`{"tags":["a"],"required":["end_user"]}`, `{"end_users":"off"}`, `{"end_users":"off"}`},
		{`{"end_users":"hashed"}`, `{"end_users":"plain"}`, `{"end_users":"hashed"}`},
		{`{"end_users":"off"}`, `{"end_users":"hashed"}`, `{"end_users":"off"}`},
		{`{"end_users":"hashed"}`, `{"end_users":"off"}`, `{"end_users":"off"}`},
		{`token{"required":["tag:a"]}`, `{"fixed_tags":{"b":"c"}}`, `{"required":["tag:a"],"fixed_tags":{"b":"c"}}`},
	} {
		backup, ofToken := strings.CutPrefix(c.backup, "token")
		policyOf := func(s string) string { return `{"attribution":` + s + `}` }
		got, _, err := narrowPolicy(policyOf(backup), policyOf(c.current), !ofToken)
		if err != nil || got != policyOf(c.want) {
			t.Errorf("%s and %s: got %s, %v", c.backup, c.current, got, err)
		}
		if _, err := parsePolicy([]byte(got), !ofToken); err != nil {
			t.Errorf("%s and %s: %v", c.backup, c.current, err)
		}
	}
}

// TestAttributionHashed: a project that asks for hashes has one name for an end user, also after a restart, which no
// other project has for it, and the plain name is in no file. A project that keeps no end users has none.
func TestAttributionHashed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	setPolicy := func(project, endUsers string) {
		p.manage("PATCH", "/manage/projects/"+project,
			`{"policy":{"attribution":{"tags":["who"],"end_users":"`+endUsers+`"}}}`, 200, nil)
	}
	const name = "alice.plainname@example.com"
	p.secrets = append(p.secrets, name)
	setPolicy(p.project, endUsersHashed)
	chat := func(token string) *requestEntry {
		t.Helper()
		res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"`+name+`","prompt_cache_key":"`+name+`"`),
			"Content-Type", "application/json", "Authorization", "Bearer "+token, "X-LLM-Proxy-Tags", "who="+name)
		if res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
		return new(p.lastCall())
	}
	first := chat(p.token)
	hash := first.EndUser
	if len(hash) != 34 || !strings.HasPrefix(hash, "h-") || first.Session != hash || first.Tags.value("who") != hash {
		t.Errorf("got %s", first.attributed())
	}
	if r := p.provider.received(); !strings.Contains(r[0].body, name) {
		t.Error("the provider got another end user")
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if got := chat(p.token).EndUser; got != hash {
		t.Errorf("after a restart: %s, before %s", got, hash)
	}
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other","openai_api_key":"`+p.provider.key+`"}`, 201, &other)
	setPolicy(other.ID, endUsersHashed)
	own := p.project
	p.project = other.ID
	_, token := p.newToken(`"name":"o"`)
	if got := chat(token).EndUser; got == hash || len(got) != 34 {
		t.Errorf("another project has %s", got)
	}
	setPolicy(own, endUsersOff)
	if got := chat(p.token); got.attributed() != "||" {
		t.Errorf("with end_users off: %s", got.attributed())
	}
}

// TestAttributionFixedTags: a client cannot change or remove a tag of its token by an end user of the same text, which
// is hashed or left out, and so cannot leave the budget of the tag.
func TestAttributionFixedTags(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(10 * time.Second)
	_, token := p.newToken(`"policy":{"attribution":{"required":["tag:team"],"fixed_tags":{"team":"search"}}}`)
	for i, endUsers := range []string{endUsersHashed, endUsersOff, endUsersPlain} {
		p.manage("PATCH", "/manage/projects/"+p.project, fmt.Sprintf(`{"policy":{"attribution":{"end_users":%q},
			"limits":[{"count":"requests","max":%d,"per":"day","for_each":"tag:team"}]}}`, endUsers, i+1), 200, nil)
		for n, want := range []int{200, 429} {
			res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"search"`), "Content-Type", "application/json",
				"Authorization", "Bearer "+token, "X-LLM-Proxy-Session", "search")
			row := p.lastCall()
			if res.status != want || row.Tags.value("team") != "search" || (row.Session == "search") != (i == 2) {
				t.Errorf("%s %d: got %d and %s", endUsers, n, res.status, row.attributed())
			}
		}
	}
}

// TestAttributionLost: a call that was running when the program died is on record with what it said.
func TestAttributionLost(t *testing.T) {
	t.Parallel()
	st := mustOpenStore(t, filepath.Join(t.TempDir(), "llm-proxy.db"))
	w := st.newLedgerWriter()
	defer w.close()
	a := &attribution{session: `s"1`, endUser: "Zoë", tags: tagList{{"task", "1"}, {"team", "x"}}}
	rows := []requestRow{{id: 1 << 41, endpoint: "POST /v1/responses", model: "m", attribution: a},
		{id: 1<<41 + 1, endpoint: "POST /v1/responses", model: "m"}}
	pending := &pendingBatch{}
	for i := range rows {
		pending.add(rows[i].id, rows[i].appendPendingRecord(nil))
	}
	batch, _ := buildLedgerBatch(pending, nil, nil)
	if err := w.write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	expect := func(outcome callOutcome) {
		t.Helper()
		for i, want := range []string{a.describe(), "||"} {
			v, err := st.requestByID(t.Context(), rows[i].id)
			if err != nil || v.outcome != outcome || v.attribution.describe() != want {
				t.Errorf("got %s %s, %v", v.outcome, v.attribution.describe(), err)
			}
		}
	}
	expect(outcomeOpen)
	complete := func(*requestRow) error { return nil }
	if n, err := recoverLost(t.Context(), st, w, complete, pendingReplica(t, st)); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	expect(outcomeLost)
	sums, err := collect(t.Context(), st.readDB, "reading sums", func(s *string) []any { return []any{s} },
		`SELECT attribute || ' ' || value || ' ' || calls || ' ' || outcome FROM attribution_sums ORDER BY 1`)
	want := []string{"end_user Zoë 1 lost", `session s"1 1 lost`, "tag:task 1 1 lost", "tag:team x 1 lost"}
	if err != nil || !slices.Equal(sums, want) {
		t.Errorf("the sums are %q, %v", sums, err)
	}
}

// TestAttributionFilters: lists of calls, running or ended, and downloads have the filters, alone and together.
func TestAttributionFilters(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project,
		`{"policy":{"attribution":{"tags":["team","cost-center"],"end_users":"hashed"}}}`, 200, nil)
	call := func(session, user, tags string) {
		t.Helper()
		headers := []string{"Content-Type", "application/json", "Authorization", "Bearer " + p.token}
		for name, value := range map[string]string{sessionHeader: session, endUserHeader: user, tagsHeader: tags} {
			if value != "" {
				headers = append(headers, name, value)
			}
		}
		if res := p.do("POST", "/v1/chat/completions", chatBody(), headers...); res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	call("s1", "alice", "team=a")
	call("s1", "bob", "team=b,cost-center=7")
	call("s2", "alice", "cost-center=7")
	call("", "", "")
	hash := p.ledger()[0].EndUser
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(": wait\n\n")
		return c.waitClosed(hangTimeout) && false
	})
	stream := p.stream(p.token, `"user":"alice","prompt_cache_key":"s1"`)
	defer stream.body.Close()
	inProject := "&project_id=" + p.project
	for _, c := range []struct {
		query string
		want  int // ended and running calls
	}{
		{"session=s1", 3}, {"session=s3", 0}, {"end_user=" + hash, 3}, {"end_user=alice" + inProject, 3},
		{"end_user=alice", 0}, {"end_user=" + hash + inProject, 3}, {"tag=team=a", 1}, {"tag=cost-center%3D7", 2},
		{"tag=team=7", 0}, {"session=s1&end_user=" + hash, 2}, {"session=s1&tag=team=b&token_id=" + p.tokenID, 1},
		{"session=s1&token_id=tok_other", 0}, {"end_user=bob&tag=cost-center=7" + inProject, 1},
		{"session=s1&project_id=proj_other", 0}, {"end_user=alice&project_id=proj_other", 0},
	} {
		var list struct{ Data []requestEntry }
		p.manage("GET", "/manage/requests?"+c.query, "", 200, &list)
		if len(list.Data) != c.want {
			t.Errorf("%s: got %d calls, want %d", c.query, len(list.Data), c.want)
		}
	}
	for query, want := range map[string]int{"session=s1": 1, "session=s2": 0, "end_user=alice" + inProject: 1,
		"end_user=" + hash: 1, "end_user=bob" + inProject: 0, "tag=team=a": 0} {
		var list struct{ Data []struct{ Session string } }
		p.manage("GET", "/manage/streams?"+query, "", 200, &list)
		if len(list.Data) != want {
			t.Errorf("running calls with %s: got %d, want %d", query, len(list.Data), want)
		}
	}
	for _, query := range []string{"tag=team", "tag=Team=a", "tag=team=", "tag=team=a+b", "tag:team=a"} {
		if res := p.manageAs(p.adminKey, "GET", "/manage/requests?"+query, ""); res.status != 400 {
			t.Errorf("%s: got %d", query, res.status)
		}
	}
}

// TestAttributionRetention: sums of sessions are kept as long as calls, those of end users and tags for longer. Each
// deletion is a small step.
func TestAttributionRetention(t *testing.T) {
	t.Parallel()
	st := mustOpenStore(t, oldDatabase(t, "schema/002_audit.sql", oneTokenSQL(0)...))
	w := st.newLedgerWriter()
	defer w.close()
	var batch ledgerBatch
	for i := range int64(600) {
		at := (i % 3) * hourMS
		batch.records = append(batch.records, &requestRow{
			id: at<<21 | i + 1, started: at, project: 1, token: 7,
			outcome: outcomeOK, source: usageNone,
			attribution: &attribution{session: fmt.Sprint("s", i), endUser: "u"}})
	}
	if err := w.write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	left := func() string {
		t.Helper()
		out, err := collect(t.Context(), st.readDB, "reading sums", func(s *string) []any { return []any{s} },
			`SELECT attribute || ' ' || (at / 3600000) || ' ' || count(*) FROM attribution_sums
			GROUP BY attribute, at`)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(out, ", ")
	}
	steps := 0
	for ; steps < 20; steps++ {
		n, err := st.deleteOldAttributionSums(t.Context(), 2*hourMS, hourMS, 20)
		if err != nil || n > 202 {
			t.Fatal(n, err)
		}
		if n == 0 {
			break
		}
	}
	if got := left(); steps == 20 || got != "end_user 1 1, end_user 2 1, session 2 200" {
		t.Errorf("after %d steps: %s", steps, got)
	}
}

// TestAttributionUsage: sums by session, end user and tag add up to all calls, in every combination with other groups,
// however many values have rows of their own. A value has what its calls have.
func TestAttributionUsage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"attribution":{"tags":["team"]},`+
		`"cache":{"ttl_seconds":60,"when":"always"}}}`, 200, nil)
	_, other := p.newToken(`"policy":{"models":["gpt-4o-mini"],"attribution":{"fixed_tags":{"team":"x"}}}`)
	call := func(token, session, user, tags string, members ...string) {
		headers := []string{"Content-Type", "application/json", "Authorization", "Bearer " + token}
		for name, value := range map[string]string{sessionHeader: session, endUserHeader: user, tagsHeader: tags} {
			if value != "" {
				headers = append(headers, name, value)
			}
		}
		p.do("POST", "/v1/chat/completions", chatBody(members...), headers...)
	}
	for i := range 3 {
		call(p.token, "s1", "alice", "team=a", `"seed":`+fmt.Sprint(i))
		call(p.token, "s2", "bob", "", `"seed":1`+fmt.Sprint(i))
		call(other, "", "alice", "")
	}
	call(p.token, "s3", "", "team=b", `"seed":77`)
	call(p.token, "s3", "", "team=nothing=", `"seed":78`) // refused
	p.cacheSettled()
	p.waitSettled()
	type usage struct {
		Calls, Tokens               int64
		Session, EndUser, Tag, Rest string
		Cost, Saved                 float64
	}
	read := func(query string) (rows []usage) {
		t.Helper()
		var list struct {
			Data []struct {
				Calls              int64
				Input              int64 `json:"input_tokens"`
				Output             int64 `json:"output_tokens"`
				Hits               int64 `json:"cache_hits"`
				Cost, Saved        float64
				Session, Tag, Rest string
				EndUser            string `json:"end_user"`
			}
		}
		p.manage("GET", "/manage/usage?"+query, "", 200, &list)
		for _, r := range list.Data {
			rows = append(rows, usage{Calls: r.Calls, Tokens: r.Input + r.Output + r.Hits, Session: r.Session,
				EndUser: r.EndUser, Tag: r.Tag, Rest: r.Rest, Cost: r.Cost, Saved: r.Saved})
		}
		return rows
	}
	sum := func(rows []usage) (all usage) {
		for _, r := range rows {
			all.Calls, all.Tokens = all.Calls+r.Calls, all.Tokens+r.Tokens
			all.Cost, all.Saved = all.Cost+r.Cost, all.Saved+r.Saved
		}
		return all
	}
	want := sum(read("interval=total"))
	if want.Calls != 11 || want.Cost == 0 || want.Saved == 0 {
		t.Fatalf("the calls are %+v", want)
	}
	for _, attribute := range []string{"session", "end_user", "tag:team", "tag:none"} {
		for _, groups := range []string{"", ",project", ",token,model", ",model,endpoint,outcome", ",cache,token"} {
			for _, interval := range []string{"hour", "day", "month", "total"} {
				for _, top := range []string{"1", "2", "1000"} {
					query := "group_by=" + attribute + groups + "&interval=" + interval + "&top=" + top
					rows := read(query)
					got := sum(rows)
					if got.Calls != want.Calls || got.Tokens != want.Tokens || math.Abs(got.Cost-want.Cost) > 1e-9 ||
						math.Abs(got.Saved-want.Saved) > 1e-9 {
						t.Errorf("%s: the rows add up to %+v, want %+v: %+v", query, got, want, rows)
					}
				}
			}
		}
	}
	for query, want := range map[string]string{
		"group_by=session&interval=total":                       "s1:3 s2:3 s3:2 none:3",
		"group_by=end_user&interval=total":                      "alice:6 bob:3 none:2",
		"group_by=tag:team&interval=total":                      "a:3 b:1 x:3 none:4",
		"group_by=session&interval=total&top=1":                 "s1:3 none:3 other:5",
		"group_by=session&interval=total&token_id=" + p.tokenID: "s1:3 s2:3 s3:2",
	} {
		var got strings.Builder
		for _, r := range read(query) {
			got.WriteString(" " + r.Session + r.EndUser + r.Tag + r.Rest + ":" + fmt.Sprint(r.Calls))
		}
		if strings.TrimSpace(got.String()) != want {
			t.Errorf("%s: got%s, want %s", query, got.String(), want)
		}
	}
	for _, query := range []string{"group_by=session,end_user", "group_by=tag:", "group_by=tag:Team",
		"group_by=session,service_tier", "top=5", "group_by=session&top=0", "group_by=session&top=1001"} {
		if res := p.manageAs(p.adminKey, "GET", "/manage/usage?"+query, ""); res.status != 400 {
			t.Errorf("%s: got %d", query, res.status)
		}
	}
}

// checkErasedFromFile checks a copy of the database, which has what the database has, without the free space in its
// file: name and hash are gone, other is there.
func checkErasedFromFile(t *testing.T, p *testProxy, name, hash, other string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "copy.db")
	st, err := openReadOnly(filepath.Join(p.env["DATA_DIR"], "llm-proxy.db"), false)
	if err == nil {
		err = errors.Join(st.copyTo(t.Context(), file), st.close())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{name, hash} {
		if strings.Contains(mustReadFile(t, file), text) {
			t.Errorf("%s is left in the database", text)
		}
	}
	if !strings.Contains(mustReadFile(t, file), other) {
		t.Error("the copy lacks another end user")
	}
}

// TestAttributionErased: after an end user is erased, no table has the name, nor its hash. The calls, what they cost
// and all sums stay. A call that is running then ends without the name, and without content.
func TestAttributionErased(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowSecret(promptCanary) // in stored content, which the test reads
	const name, other = "erased.name+1/x@example.com", "kept.name@example.com"
	setPolicy := func(endUsers string) {
		p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":3,"attribution":{`+
			`"tags":["who","team"],"end_users":"`+endUsers+`"}}}`, 200, nil)
	}
	call := func(user string) {
		t.Helper()
		res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"`+user+`","prompt_cache_key":"`+user+`"`),
			"Content-Type", "application/json", "Authorization", "Bearer "+p.token, "X-LLM-Proxy-Tags", "team=a")
		if res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	setPolicy(endUsersHashed)
	call(name)
	hash := p.lastCall().EndUser
	setPolicy(endUsersPlain)
	for range 3 {
		call(name)
	}
	call(other)
	p.waitSettled()
	total := func() (rows []usageRow) {
		rows, err := p.instance.store.usage(t.Context(), usageQuery{interval: "total", to: math.MaxInt64, limit: 9})
		if err != nil {
			t.Fatal(err)
		}
		return rows
	}
	before := total()
	release := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(": wait\n\n")
		<-release
		return chatEventsEnd(c)
	})
	stream := p.stream(p.token, `"user":"`+name+`"`)
	if _, err := stream.read(1); err != nil {
		t.Fatal(err)
	}
	var erased struct{ Erased int64 }
	query := "?" + url.Values{"end_user": {name}}.Encode()
	p.manage("DELETE", "/manage/projects/"+p.project+"/end-users"+query, "", 200, &erased)
	if after := total(); erased.Erased != 4 || !slices.Equal(after, before) {
		t.Errorf("%d calls were erased; the sums are %+v, were %+v", erased.Erased, after, before)
	}
	close(release)
	if _, err := stream.readAll(); err != nil {
		t.Fatal(err)
	}
	rows := p.ledger()
	for i, want := range []string{`||{"team":"a"}`, `||{"team":"a"}`, `||{"team":"a"}`, `||{"team":"a"}`,
		other + "|" + other + `|{"team":"a"}`, "||"} {
		if rows[i].attributed() != want {
			t.Errorf("call %d: %s, want %s", i, rows[i].attributed(), want)
		}
		content := p.manageAs(p.adminKey, "GET", "/manage/requests/"+rows[i].ID+"/content", "").status
		if wantContent := map[bool]int{true: 404, false: 200}[i != 4]; content != wantContent {
			t.Errorf("call %d: its content answers %d, want %d", i, content, wantContent)
		}
	}
	var usage struct {
		Data []struct {
			EndUser, Rest string
			Calls         int64
		}
	}
	p.manage("GET", "/manage/usage?interval=total&group_by=end_user", "", 200, &usage)
	if got := fmt.Sprint(usage.Data); got != "[{ other 1} { none 5}]" && len(usage.Data) != 2 {
		t.Errorf("by end user: %v", usage.Data)
	}
	if !usesTestDatabase() {
		checkErasedFromFile(t, p, name, hash, other)
	}
	p.manage("DELETE", "/manage/projects/"+p.project+"/end-users"+query, "", 200, &erased)
	if erased.Erased != 0 {
		t.Errorf("%d calls are left", erased.Erased)
	}
	if res := p.manageAs(p.adminKey, "DELETE", "/manage/projects/"+p.project+"/end-users?end_user="+
		strings.Repeat("a", 257), ""); res.status != 400 {
		t.Errorf("a long name: got %d", res.status)
	}
}

// TestAttributionErasedAlone: calls that end while their end user is erased end without the name, and what others have
// used with a tag of the same text stays.
func TestAttributionErasedAlone(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const name = "amber"
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"attribution":{"tags":["who","team"]}}}`, 200, nil)
	for user, tags := range map[string]string{name: "who=" + name, "other": "team=" + name} {
		res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"`+user+`"`), "Content-Type", "application/json",
			"Authorization", "Bearer "+p.token, "X-LLM-Proxy-Tags", tags)
		if res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	release := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(": wait\n\n")
		<-release
		return chatEventsEnd(c)
	})
	for range 5 {
		var ends sync.WaitGroup
		for range 8 {
			stream := p.stream(p.token, `"user":"`+name+`"`)
			if _, err := stream.read(1); err != nil {
				t.Fatal(err)
			}
			ends.Go(func() { _, _ = stream.readAll() })
		}
		ends.Go(func() {
			for range 8 {
				release <- struct{}{}
			}
		})
		p.manage("DELETE", "/manage/projects/"+p.project+"/end-users?end_user="+name, "", 200, nil)
		ends.Wait()
	}
	p.waitSettled()
	for _, row := range p.ledger() {
		if row.EndUser == name {
			t.Errorf("the row of %s has the name", row.ID)
		}
	}
	for attribute, want := range map[string][]string{"end_user": {"other"}, "tag:who": nil, "tag:team": {name}} {
		top, err := p.instance.store.topValues(t.Context(),
			&usageQuery{attribute: attribute, to: math.MaxInt64, top: 9, largestBy: "calls"}, 99)
		var values []string
		for _, v := range top {
			values = append(values, v.name)
		}
		if err != nil || !slices.Equal(values, want) {
			t.Errorf("%s has the values %q, want %q: %v", attribute, values, want, err)
		}
	}
}

// TestAttributionEnding: an erasure waits for a call that may be ending with the name.
func TestAttributionEnding(t *testing.T) {
	t.Parallel()
	rc := newRunningCalls(callLimits{maxCalls: 9})
	isName := func(name string) bool { return name == "amber" }
	for _, settling := range []bool{false, true} {
		c := &runningCall{}
		c.settling.Store(settling)
		c.info.Store(&callInfo{project: &projectState{id: "p"}, attribution: &attribution{endUser: "amber"}})
		if err := rc.add(c); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if rc.forgetEndUser("p", isName) != settling || !c.unnamed.Load() {
				t.Errorf("settling %v: the erasure takes it for the opposite", settling)
			}
		}
		rc.remove(c)
		if rc.forgetEndUser("p", isName) {
			t.Error("a call that has left is waited for")
		}
	}
}

// chatEventsEnd sends the events of a stream and ends it.
func chatEventsEnd(c *providerConn) bool {
	for _, e := range chatEvents(true) {
		if c.chunk(e) != nil {
			return false
		}
	}
	return c.chunk("") == nil
}

// TestAttributionPages: a session has its page and its JSON, with its calls in order and what they used. The pages of
// calls and the dashboard link to it.
func TestAttributionPages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"attribution":{"tags":["team"]}}}`, 200, nil)
	const session = `s/1 "?&<b>`
	for range 3 {
		p.do("POST", "/v1/chat/completions", chatBody(`"user":"Zoë <i>","prompt_cache_key":`+quote(session)),
			"Content-Type", "application/json", "Authorization", "Bearer "+p.token, "X-LLM-Proxy-Tags", "team=search")
	}
	rows := p.ledger()
	path := "?" + url.Values{"session": {session}}.Encode()
	var s struct {
		Session, Next string
		Calls         int64
		Input         int64   `json:"input_tokens"`
		Cost          float64 `json:"cost"`
		Data          []requestEntry
	}
	p.manage("GET", "/manage/sessions"+path+"&limit=2&project_id="+p.project, "", 200, &s)
	if s.Session != session || s.Calls != 3 || s.Input != 27 || s.Cost == 0 || len(s.Data) != 2 ||
		s.Data[0].ID != rows[0].ID || s.Data[1].ID != rows[1].ID || s.Next == "" {
		t.Errorf("got %+v", s)
	}
	p.manage("GET", "/manage/sessions"+path+"&limit=2&after="+s.Next, "", 200, &s)
	if len(s.Data) != 1 || s.Data[0].ID != rows[2].ID {
		t.Errorf("the second page is %+v", s.Data)
	}
	for query, status := range map[string]int{"": 400, "?session=none": 404, path + "&project_id=none": 404} {
		if res := p.manageAs(p.adminKey, "GET", "/manage/sessions"+query, ""); res.status != status {
			t.Errorf("%q: got %d %s", query, res.status, res.body)
		}
	}
	b := p.signIn(p.adminKey)
	for page, want := range map[string][]string{
		"/admin/sessions" + path:            {"/admin/requests/" + rows[2].ID, html.EscapeString(session), "27"},
		"/admin/requests/" + rows[0].ID:     {"/admin/sessions?session=s%2f1%20%22%3f%26%3cb%3e", "Zoë &lt;i&gt;"},
		"/admin/dashboard":                  {"/admin/sessions?session=s%2F1", "End users", "Tag team", "&lt;i&gt;"},
		"/admin/requests?tag=team%3Dsearch": {rows[0].ID, "Zoë &lt;i&gt;"},
		"/admin/dashboard?by=end_user":      {"Calls by end user", `<option value="end_user" selected>End users`},
		"/admin/dashboard?by=tag%3Ateam&project=" + p.project: {"Calls by tag team",
			`<option value="tag:team" selected>Tag team`, `<option value="session">`},
		"/admin/projects/" + p.project: {"/erase-end-user"},
		"/admin/projects/" + p.project + "/erase-end-user?end_user=Zo%C3%AB+%3Ci%3E": {`value="Zoë &lt;i&gt;"`},
	} {
		body := b.get(page).body
		for _, text := range want {
			if !strings.Contains(body, text) {
				t.Errorf("%s lacks %s", page, text)
			}
		}
		if strings.Contains(body, "?&<b>") || strings.Contains(body, "Zoë <i>") {
			t.Errorf("%s has text of a client as HTML", page)
		}
	}
	if body := b.get("/admin/dashboard?by=tag%3Anone").body; !strings.Contains(body, "Calls by tag none") {
		t.Errorf("an unknown tag: %s", body)
	}
	if res := b.get("/admin/dashboard?by=tag%3ANO"); res.status != 400 {
		t.Errorf("no attribute: got %d", res.status)
	}
	csv := b.post("/admin/dashboard/export", url.Values{"period": {"7d"}}).body
	for _, line := range []string{"end_user,,Zoë <i>,,3,,,36,", "tag:team,,search,,3,,,36,"} {
		if !strings.Contains(csv, line) {
			t.Errorf("the download lacks %s: %s", line, csv)
		}
	}
	calls := b.post("/admin/requests/export", url.Values{"format": {"csv"}, "period": {"7d"}, "session": {session},
		"end_user": {"Zoë <i>"}})
	trail := p.manageAs(p.adminKey, "GET", "/manage/audit?action=export", "").body
	if calls.status != 200 || !strings.Contains(calls.body, "Zoë <i>") || strings.Contains(trail, "Zo") ||
		strings.Contains(trail, "s/1") || strings.Count(trail, `":"`+endUserHashPrefix) != 2 {
		t.Errorf("a download of an end user's calls: %d %s; the audit trail has %s", calls.status, calls.body, trail)
	}
	res := b.post("/admin/projects/"+p.project+"/erase-end-user", url.Values{"end_user": {"Zoë <i>"}})
	if res.status != 303 || p.ledger()[0].EndUser != "" {
		t.Errorf("the form: got %d", res.status)
	}
}

// TestAttributionOfNothing: a client that says nothing of its calls costs no allocation.
func TestAttributionOfNothing(t *testing.T) {
	header := map[string][]string{"Content-Type": {"application/json"}, "User-Agent": {"curl"}}
	if n := testing.AllocsPerRun(100, func() {
		if a, err := readAttribution(header, &bodyIdentity{}, nil, nil); a != nil || err != nil {
			t.Error(a, err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestReportsShareTheDatabase: large reports on attributes never take all connections to the database. While as many
// run as may, another one waits for a moment and is told to come back; calls, pages and other reports go on.
func TestReportsShareTheDatabase(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // 503 is an error of ours
	call := func() int {
		return p.do("POST", "/v1/chat/completions", chatBody(`"user":"ann"`), "Authorization", "Bearer "+p.token,
			"Content-Type", "application/json").status
	}
	call()
	p.waitSettled()
	get := func(query string) testResponse { return p.manageAs(p.adminKey, "GET", "/manage/usage"+query, "") }
	if maxReports >= readPoolSize {
		t.Error("reports may take all connections")
	}
	running := p.instance.store.reports
	for range cap(running) {
		running <- struct{}{}
	}
	var waiting sync.WaitGroup
	for _, query := range []string{"?group_by=end_user", "?group_by=session&project_id=" + p.project} {
		waiting.Go(func() {
			if res := get(query); res.status != 503 || res.errorCode() != "too_many_reports" ||
				res.header.Get("Retry-After") == "" {
				t.Errorf("%s: got %d %s", query, res.status, res.body)
			}
		})
	}
	if res := get("?group_by=model"); res.status != 200 {
		t.Errorf("another report: got %d %s", res.status, res.body)
	}
	if status := call(); status != 200 {
		t.Errorf("a call: got %d", status)
	}
	waiting.Wait()
	waiting.Go(func() {
		if res := get("?group_by=end_user"); res.status != 200 || !strings.Contains(res.body, `"ann"`) {
			t.Errorf("after another report has ended: got %d %s", res.status, res.body)
		}
	})
	<-running
	waiting.Wait()
	if len(running) != cap(running)-1 {
		t.Errorf("%d reports are running", len(running))
	}
}
