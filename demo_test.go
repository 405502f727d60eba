// These tests run `llm-proxy demo` as a new user does: the commands that it prints work, its
// sample data is consistent, and it leaves nothing behind.
package main

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"llm-proxy/demo"
)

// crowding returns how many times longer a computation takes now than on a machine that has nothing else to do.
func crowding(t *testing.T) float64 {
	t.Helper()
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	const enough = 50 * time.Millisecond
	start, before := time.Now(), used()
	for used()-before < enough {
	}
	return max(1, float64(time.Since(start))/float64(enough))
}

// TestDemo starts the demo and runs the commands that it prints. The start may take at most two
// seconds, so it does not run in parallel with other tests; the rest does.
func TestDemo(t *testing.T) {
	env := serveEnv(t)
	env["TMPDIR"] = t.TempDir()
	env["DATA_DIR"], env["DATABASE_URL"] = "/nonexistent/and/not/used", "sqlite:/nonexistent/x"
	env["OPENAI_API_URL"] = "https://example.com"
	crowd, start := crowding(t), time.Now()
	s := serveProgram(t, env, "demo")
	limit := 2 * time.Second
	if info, ok := debug.ReadBuildInfo(); ok &&
		slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		limit = time.Minute // the race detector makes SQLite, which is compiled to Go, many times slower
	}
	took := time.Since(start)
	if crowd = max(crowd, crowding(t)); float64(took) > float64(limit)*crowd {
		t.Errorf("the demo takes %v to start, and computations take %.1f times longer than they should", took, crowd)
	}
	t.Parallel()
	out := string(s.out.bytes())
	calls := parseDemoCommands(t, out)
	if len(calls) != 8 {
		t.Fatalf("%d curl lines in %s", len(calls), out)
	}
	want := []string{`"object":"chat.completion"`, "data: [DONE]", `"tool_calls"`, `"type":"message"`,
		`"candidates":`, `"calls":`, `"outcome":`, `"request_count":`}
	var clients sync.WaitGroup
	for i, c := range calls {
		clients.Go(func() {
			status, body := c.do(t)
			if status != 200 || !strings.Contains(body, want[i]) {
				t.Errorf("%s %s: %d %s", c.method, c.url, status, clip(body, 300))
			}
		})
	}
	for trigger, want := range map[string]int{"[[error 429]]": 429, "[[error 500]]": 500, "no-such-model": 404} {
		c := calls[0]
		c.body = strings.Replace(c.body, "Hello", trigger, 1)
		if trigger == "no-such-model" {
			c.body = strings.Replace(calls[0].body, "gpt-4o-mini", trigger, 1)
		}
		clients.Go(func() {
			if status, body := c.do(t); status != want {
				t.Errorf("%s: %d %s", trigger, status, body)
			}
		})
	}
	clients.Wait()
	token, key := findCredential(t, tokenPrefix, out), findCredential(t, manageKeyPrefix, out)
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(env["TMPDIR"]); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for _, secret := range []string{token, key, "sk-demo-"} {
		if bytes.Contains(s.log.bytes(), []byte(secret)) {
			t.Error("a secret is in the log")
		}
	}
	if strings.Contains(out, "sk-demo-") {
		t.Error("the provider's key is printed")
	}
}

// A demoCommand is a curl line as a request.
type demoCommand struct {
	method, url, body string
	header            http.Header
}

// parseDemoCommands reads the printed curl commands, with the variables that the export line
// sets.
func parseDemoCommands(t *testing.T, out string) (lines []demoCommand) {
	t.Helper()
	vars := map[string]string{}
	export := regexp.MustCompile(`(?m)^  export .*$`).FindString(out)
	for _, m := range regexp.MustCompile(`([A-Z]+)=("[^"]*"|\S+)`).FindAllStringSubmatch(export, -1) {
		vars[m[1]] = strings.Trim(m[2], `"`)
	}
	text := strings.ReplaceAll(out, "\\\n", " ")
	for _, l := range regexp.MustCompile(`(?m)^  curl ('[^']*'|[^'\n])*`).FindAllString(text, -1) {
		c := demoCommand{method: "GET", header: http.Header{}}
		words := regexp.MustCompile(`'[^']*'|"[^"]*"|\S+`).FindAllString(l, -1)[1:]
		for i := range words {
			w := words[i]
			if quoted := strings.Trim(w, "'"); quoted != w {
				w = quoted
			} else {
				w = os.Expand(strings.Trim(w, `"`), func(name string) string { return vars[name] })
			}
			switch {
			case w == "-H" || w == "-d":
				continue
			case i > 0 && words[i-1] == "-H":
				name, value, _ := strings.Cut(w, ": ")
				c.header.Set(name, value)
			case i > 0 && words[i-1] == "-d":
				c.method, c.body = "POST", w
			case w != "-N":
				c.url = w
			}
		}
		lines = append(lines, c)
	}
	return lines
}

func (c demoCommand) do(t *testing.T) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), c.method, c.url, strings.NewReader(c.body))
	if err != nil {
		return 0, err.Error()
	}
	req.Header = c.header
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err.Error()
	}
	return res.StatusCode, string(b)
}

// TestDemoData: sums, counts and rows agree, and every kind of token and outcome is there.
func TestDemoData(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	now := time.Now()
	d, err := p.instance.addSampleData(t.Context(), now, newSecret(p.provider.key))
	if err != nil {
		t.Fatal(err)
	}
	p.secrets = append(p.secrets, d.token(), d.key())
	if d.projects != 3 || d.tokens != 12 || d.calls < 4000 || d.calls > 15000 {
		t.Errorf("there are %d projects, %d tokens, %d calls", d.projects, d.tokens, d.calls)
	}
	one := func(query string) (n int64) {
		t.Helper()
		query = strings.ReplaceAll(query, "{now}", strconv.FormatInt(time.Now().UnixMilli(), 10))
		if err := p.instance.store.readDB.QueryRow(query).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for name, query := range map[string]string{
		"request_count": `SELECT count(*) FROM tokens t WHERE request_count <>
			(SELECT count(*) FROM requests r WHERE r.token = t.seq AND r.outcome <> 'refused')`,
		"last_used_at": `SELECT count(*) FROM tokens t WHERE request_count > 0 AND last_used_at IS NULL`,
		"calls summed by day": `SELECT (SELECT sum(calls) FROM usage_sums WHERE grain = 'day' AND token <> 0) -
			(SELECT count(*) FROM requests)`,
		"tokens summed by hour": `SELECT
			(SELECT sum(input_tokens + output_tokens) FROM usage_sums WHERE grain = 'hour' AND token <> 0) -
			(SELECT sum(input_tokens + output_tokens) FROM requests)`,
		"cost": `SELECT (SELECT sum(cost) FROM usage_sums WHERE grain = 'day' AND token = 0 AND project <> 0) -
			(SELECT sum(cost) FROM requests)`,
		"rows in the future": `SELECT count(*) FROM requests WHERE started_at > {now}`,
		"calls before their token, or after its end": `SELECT count(*) FROM requests r JOIN tokens t ON t.seq = r.token
			WHERE r.started_at < t.created_at OR
				r.outcome <> 'refused' AND (r.started_at > t.expires_at OR r.started_at > t.revoked_at)`,
		"more than max_requests":   `SELECT count(*) FROM tokens WHERE request_count > max_requests`,
		"first byte after the end": `SELECT count(*) FROM requests WHERE first_byte_us > total_us`,
		"parts larger than the whole": `SELECT count(*) FROM requests
			WHERE cached_tokens > input_tokens OR reasoning_tokens > output_tokens`,
		"calls of the wrong provider": `SELECT count(*) FROM requests r JOIN upstreams u ON u.seq = r.upstream
			WHERE (u.provider = 'anthropic') <> (r.endpoint = 'POST /v1/messages')`,
	} {
		if n := one(query); n != 0 {
			t.Errorf("%s: %d", name, n)
		}
	}
	for name, query := range map[string]string{
		"revoked tokens": `SELECT count(*) FROM tokens WHERE revoked_at IS NOT NULL`,
		"expired tokens": `SELECT count(*) FROM tokens WHERE expires_at < {now}`,
		"tokens expiring soon": `SELECT count(*) FROM tokens
			WHERE expires_at BETWEEN {now} AND {now} + 3 * 86400000`,
		"tokens nearly used up": `SELECT count(*) FROM tokens
			WHERE max_requests - request_count BETWEEN 1 AND 10`,
		"unpriced calls": `SELECT count(*) FROM requests WHERE cost IS NULL AND usage_source = 'exact'`,
		"streams":        `SELECT count(*) FROM requests WHERE stream`,
		"ok":             `SELECT count(*) FROM requests WHERE outcome = 'ok'`,
		"refused":        `SELECT count(*) FROM requests WHERE outcome = 'refused'`,
		"client_gone":    `SELECT count(*) FROM requests WHERE outcome = 'client_gone'`,
		"truncated":      `SELECT count(*) FROM requests WHERE outcome = 'truncated'`,
		"upstream_error": `SELECT count(*) FROM requests WHERE outcome = 'upstream_error'`,
		"weekdays busier than weekends": `SELECT max(0, sum(CASE
			WHEN strftime('%w', started_at / 1000, 'unixepoch') IN ('0', '6') THEN -5 ELSE 2 END)) FROM requests`,
	} {
		if strings.Contains(query, "strftime") && usesTestDatabase() {
			continue // the function is SQLite's
		}
		if n := one(query); n == 0 {
			t.Errorf("no %s", name)
		}
	}
	var usage struct{ Data []json.RawMessage }
	p.manage("GET", "/manage/usage?interval=total&group_by=model", "", 200, &usage)
	if len(usage.Data) < 10 {
		t.Errorf("%d models in use", len(usage.Data))
	}
}

// TestDemoHistoryIsDeterministic: the same time gives the same calls.
func TestDemoHistoryIsDeterministic(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 34, 56, 0, time.UTC)
	a, b := newSampleRows(demo.History(now, demo.Tokens())), newSampleRows(demo.History(now, demo.Tokens()))
	if !reflect.DeepEqual(a, b) {
		t.Error("two histories of the same time differ")
	}
	ids := map[int64]bool{}
	models := map[string]bool{}
	for _, r := range a {
		ids[r.id], models[r.model] = true, true
	}
	if len(ids) != len(a) || !slices.IsSortedFunc(a,
		func(x, y *requestRow) int { return int(x.id>>idTimeShift - y.id>>idTimeShift) }) {
		t.Error("ids are not unique or not in order")
	}
	if len(models) < 10 {
		t.Errorf("models: %v", slices.Sorted(maps.Keys(models)))
	}
}

// TestDemoKeepsSettings: the demo keeps the settings of the environment, except where data is and
// where calls go, and does not print MANAGEMENT_TOKEN.
func TestDemoKeepsSettings(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	env["MANAGEMENT_TOKEN"], env["OPENAI_API_KEY"], env["LOG_FORMAT"] = goodToken, "sk-real-key-canary-123", "json"
	s := serveProgram(t, env, "demo")
	if got := s.status(t, "/manage/projects", goodToken); got != 200 {
		t.Errorf("MANAGEMENT_TOKEN: %d", got)
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	out := string(s.out.bytes())
	if strings.Contains(out, goodToken) || strings.Contains(out, "canary") || strings.Contains(out, manageKeyPrefix) ||
		!strings.Contains(out, "your MANAGEMENT_TOKEN") {
		t.Errorf("printed %s", out)
	}
	if !bytes.HasPrefix(s.log.bytes(), []byte("{")) {
		t.Errorf("LOG_FORMAT=json gives %s", s.log.bytes())
	}
	if _, err := os.Stat(env["DATA_DIR"]); err == nil {
		t.Error("DATA_DIR was created")
	}
}
