// These tests make a server ill in every way the doctor knows, and hold it to
// one line each, a remedy, an exit code, and silence about secrets.
package main

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// examined runs the doctor and checks what holds for every run.
func (p *testProxy) examined(env map[string]string, args ...string) (lines []string, err error) {
	p.t.Helper()
	all := maps.Clone(p.env)
	maps.Copy(all, env)
	out, err := runProgram(p.t, all, append([]string{"doctor"}, args...)...)
	lines = strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	failed := false
	for _, l := range lines {
		level, rest, _ := strings.Cut(l, " ")
		failed = failed || level == "FAIL"
		if level != "ok" && level != "warn" && level != "FAIL" || !strings.Contains(rest, ": ") || level != "ok" && !strings.Contains(rest, "; ") {
			p.t.Errorf("a line without level, finding or remedy: %q", l)
		}
	}
	if failed != (err != nil) {
		p.t.Errorf("the exit is %v after\n%s", err, out)
	}
	for _, s := range append([]string{goodKey, goodToken}, p.secrets...) {
		for _, form := range secretForms(s) {
			if strings.Contains(out, form) || err != nil && strings.Contains(err.Error(), form) {
				p.t.Errorf("a secret is in %s", out)
			}
		}
	}
	return lines, err
}

// has reports whether a line begins with the level and subject and has text.
func has(lines []string, level, what, text string) bool {
	for _, l := range lines {
		l, ok := strings.CutPrefix(l, level)
		if ok && strings.HasPrefix(strings.TrimLeft(l, " "), what) && strings.Contains(l, text) {
			return true
		}
	}
	return false
}

// TestDoctorBesideServer: all well, while calls are served, and nothing changes.
func TestDoctorBesideServer(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": goodToken})
	p.chat()
	p.settle()
	lines, err := p.examined(nil)
	if err != nil {
		t.Errorf("%v: %s", err, strings.Join(lines, "\n"))
	}
	for _, what := range []string{"configuration:", "clock:", "file modes:", "disk:", "database: whole", "open calls: 0", "encryption key:", "provider keys: 1, all open"} {
		if !has(lines, "ok", what, "") && (what != "disk:" || !has(lines, "warn", what, "")) { // the machine's own
			t.Errorf("no line for %s in\n%s", what, strings.Join(lines, "\n"))
		}
	}
	if n := len(p.provider.got()); n != 1 {
		t.Errorf("the provider was called %d times", n-1)
	}
	if res := p.chat(); res.status != 200 {
		t.Errorf("a call after the doctor: %d", res.status)
	}
}

func TestDoctorProvider(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"claude","provider":"anthropic","base_url":"`+p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	status := func(code int) func(*providerConn, recorded) bool {
		return func(c *providerConn, r recorded) bool {
			return c.reply(code, r.header.Get("Authorization")+" is wrong")
		}
	}
	for _, tt := range []struct {
		script              func(*providerConn, recorded) bool
		level, what, remedy string
	}{
		{status(200), "ok", "the provider takes the key", ""},
		{status(401), "FAIL", "key refused", "give it a valid key"},
		{status(403), "FAIL", "key refused", "give it a valid key"},
		{status(307), "warn", "answers 307", ""},
		{status(500), "warn", "answers 500", ""},
		{func(c *providerConn, _ recorded) bool { return c.reset() }, "FAIL", "unreachable", "check the base URL"},
	} {
		p.provider.answer(tt.script)
		lines, _ := p.examined(nil, "--provider")
		for _, name := range []string{"(primary)", "(claude)"} {
			found := false
			for _, l := range lines {
				found = found || strings.HasPrefix(l, tt.level) && strings.Contains(l, name) && strings.Contains(l, tt.what) && strings.Contains(l, tt.remedy)
			}
			if !found {
				t.Errorf("no line %s %s %s in\n%s", tt.level, name, tt.what, strings.Join(lines, "\n"))
			}
		}
	}
	for _, r := range p.provider.got() {
		if r.method != "GET" || r.target != "/v1/models" {
			t.Errorf("the provider got %s %s", r.method, r.target)
		}
	}
	if r := p.provider.last(t); r.header.Get("X-Api-Key") != p.provider.key || r.header.Get("Anthropic-Version") == "" {
		t.Error("the anthropic upstream was not asked in its own way")
	}
}

// TestDoctorFindings: each illness on a stopped server of its own.
func TestDoctorFindings(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name              string
		ill               func(t *testing.T, p *testProxy)
		env               map[string]string
		level, what, text string
	}{
		{"database readable by others", func(t *testing.T, p *testProxy) { chmod(t, p.in.cfg.databaseFile, 0o644) }, nil,
			"FAIL", "file modes:", "chmod 600"},
		{"key file readable by others", func(t *testing.T, p *testProxy) { chmod(t, filepath.Join(p.env["DATA_DIR"], keyName), 0o640) }, nil,
			"FAIL", "file modes:", "0640"},
		{"directory open to others", func(t *testing.T, p *testProxy) { chmod(t, p.env["DATA_DIR"], 0o755) }, nil,
			"warn", "file modes:", "chmod 700"},
		{"key file missing", func(t *testing.T, p *testProxy) { remove(t, filepath.Join(p.env["DATA_DIR"], keyName)) }, nil,
			"FAIL", "encryption key:", "is missing"},
		{"another key", nil, map[string]string{"ENCRYPTION_KEY": goodKey},
			"FAIL", "encryption key:", "is not the one"},
		{"database damaged", func(t *testing.T, p *testProxy) { damage(t, p.in.cfg.databaseFile) }, nil,
			"FAIL", "database:", "llm-proxy restore FILE"},
		{"database no database", func(t *testing.T, p *testProxy) { overwrite(t, p.in.cfg.databaseFile, "text") }, nil,
			"FAIL", "database:", "llm-proxy restore FILE"},
		{"database empty", func(t *testing.T, p *testProxy) { overwrite(t, p.in.cfg.databaseFile, "") }, nil,
			"warn", "database:", "missing or empty"},
		{"database newer", func(t *testing.T, p *testProxy) { execSQL(t, p, `PRAGMA user_version = 99`) }, nil,
			"FAIL", "database:", "newer than this program"},
		{"provider key moved", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `UPDATE upstreams SET base_url = 'http://127.0.0.1:1/v1'`)
		}, nil, "FAIL", "upstream up_", "does not open"},
		{"base URL no longer allowed", nil, map[string]string{"ALLOW_PRIVATE_UPSTREAMS": "false", "OPENAI_API_URL": ""},
			"FAIL", "upstream up_", "base URL"},
		{"rows open for long", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `INSERT INTO begun (batch, calls) VALUES (1, '[[1,1,1,1,"x","",0,"",0,0]]')`)
		}, nil, "warn", "open calls:", "1 have been open"},
		{"database of before", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `DROP VIEW running`)
			execSQL(t, p, `DROP TABLE begun`)
			execSQL(t, p, `PRAGMA user_version = 10`)
		}, nil, "ok", "open calls:", "not looked for"},
		{"a call from the future", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, outcome, usage_source, input_tokens, output_tokens)
				VALUES (9000000000000000000, 1, 1, 1, 'x', '', 0, '', 'ok', 'none', 0, 0)`)
		}, nil, "warn", "clock:", "behind the newest call"},
		{"no data directory", nil, map[string]string{"DATA_DIR": filepath.Join(t.TempDir(), "none")},
			"warn", "data directory:", "is not there"},
		{"wrong settings", nil, map[string]string{"LOG_LEVEL": "loud", "MANAGEMENT_TOKEN": "short-canary"},
			"FAIL", "configuration:", "LOG_LEVEL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			p.allowErrors = true
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			if tt.ill != nil {
				tt.ill(t, p)
			}
			lines, _ := p.examined(tt.env)
			if !has(lines, tt.level, tt.what, tt.text) {
				t.Errorf("no line %s %s … %s in\n%s", tt.level, tt.what, tt.text, strings.Join(lines, "\n"))
			}
			if strings.Contains(strings.Join(lines, "\n"), "short-canary") {
				t.Error("the value of a secret setting is shown")
			}
		})
	}
}

func chmod(t *testing.T, name string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
}

func overwrite(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func execSQL(t *testing.T, p *testProxy, text string) {
	t.Helper()
	db, err := openSQLite(p.in.cfg.databaseFile, 1, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.Exec(text)
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestDoctorThresholds: what a test cannot make a machine have.
func TestDoctorThresholds(t *testing.T) {
	t.Parallel()
	now := time.Now()
	space := func(free uint64, err error) func(*diagnosis) {
		return func(d *diagnosis) { d.space("/data", func(string) (uint64, error) { return free, err }) }
	}
	clock := func(year int) func(*diagnosis) {
		return func(d *diagnosis) { d.now = time.Date(year, 1, 2, 3, 4, 5, 0, time.UTC); d.clock() }
	}
	certificate := func(valid time.Duration, at time.Time) func(*diagnosis) {
		cfg := &config{}
		cfg.tlsCert, cfg.tlsKey = testCertificate(t, t.TempDir(), valid)
		return func(d *diagnosis) { d.cfg, d.now = cfg, at; d.certificate() }
	}
	modes := func(mode os.FileMode) func(*diagnosis) {
		name := filepath.Join(t.TempDir(), "key")
		overwrite(t, name, goodKey)
		chmod(t, name, mode)
		return func(d *diagnosis) {
			d.cfg, d.getenv = &config{dataDir: filepath.Join(name, "none")}, func(string) string { return name }
			d.modes()
		}
	}
	for _, tt := range []struct {
		do   func(*diagnosis)
		want string
	}{
		{space(1<<30, nil), "ok    disk"}, {space(1<<30-1, nil), "warn  disk"}, {space(100<<20, nil), "warn  disk"},
		{space(100<<20-1, nil), "FAIL  disk"}, {space(0, errors.New("x")), "warn  disk"},
		{clock(1970), "FAIL  clock"}, {clock(2024), "FAIL  clock"}, {clock(2026), "ok    clock"}, {clock(2101), "FAIL  clock"},
		{certificate(15*24*time.Hour, now), "ok    TLS"}, {certificate(13*24*time.Hour, now), "warn  TLS"},
		{certificate(-time.Hour, now), "FAIL  TLS"}, {certificate(time.Hour, now.Add(-72*time.Hour)), "FAIL  TLS"},
		{modes(0o604), "warn  file modes: ENCRYPTION_KEY_FILE"}, {modes(0o640), "ok    file modes"},
	} {
		var b bytes.Buffer
		d := &diagnosis{out: &b, now: now, cfg: &config{}}
		tt.do(d)
		if !strings.HasPrefix(b.String(), tt.want) || (d.failed > 0) != strings.HasPrefix(tt.want, "FAIL") {
			t.Errorf("got %q, want %q", b.String(), tt.want)
		}
	}
}
