// This file tests the files in deploy/ with the real tools, if they are installed: Prometheus scrapes the built binary and
// runs every query of the dashboard and of the alerts; promtool and systemd-analyze check their files.
package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
)

// tool skips the test if a program is not installed.
func tool(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
}

func output(t *testing.T, stdin io.Reader, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestAlertRules: the rules are valid, and each has a test in which it fires.
func TestAlertRules(t *testing.T) {
	tool(t, "promtool")
	output(t, nil, "promtool", "check", "config", "../deploy/prometheus.yml")
	output(t, nil, "promtool", "test", "rules", "../deploy/alerts_test.yml")
	tests := read(t, "../deploy/alerts_test.yml")
	manual := read(t, "../docs/operate.md")
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(read(t, "../deploy/alerts.yml"), -1) {
		if !strings.Contains(tests, "alertname: "+m[1]+"\n        exp_alerts:\n") {
			t.Errorf("no test makes %s fire", m[1])
		}
		if !strings.Contains(manual, "`"+m[1]+"`") {
			t.Errorf("docs/operate.md does not say what to do about %s", m[1])
		}
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestUnit: systemd-analyze finds no problem in the units.
func TestUnit(t *testing.T) {
	tool(t, "systemd-analyze")
	dir := t.TempDir()
	var units []string
	for _, name := range []string{"llm-proxy.service", "llm-proxy.socket"} {
		unit := filepath.Join(dir, name)
		text := strings.ReplaceAll(read(t, "../deploy/"+name), "/usr/local/bin/llm-proxy", "/bin/true")
		if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		units = append(units, unit)
	}
	if out := output(t, nil, "systemd-analyze", append([]string{"verify"}, units...)...); strings.Contains(out, "llm-proxy.s") {
		t.Errorf("%s", out)
	}
}

// TestPrometheus: promtool accepts the metrics page, and a real Prometheus with the rules of deploy/ scrapes it and
// answers every query.
func TestPrometheus(t *testing.T) {
	tool(t, "prometheus")
	tool(t, "promtool")
	t.Setenv("METRICS_ADDR", freeAddress(t))
	p := newProxy(t)
	client := p.client(p.token)
	ask := func(user string) {
		_, _ = client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "gpt-4o-mini", User: openai.String(user),
			Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hi")}})
	}
	p.provider.script(func(w http.ResponseWriter, _ *recorded) { reply(w, 400, `{"error":{}}`) })
	ask("a")
	_, _ = http.Get(p.url + "/v1/models") // without a token
	page := get(t, "http://"+os.Getenv("METRICS_ADDR")+"/metrics")
	if out := output(t, strings.NewReader(page), "promtool", "check", "metrics"); strings.TrimSpace(out) != "" {
		t.Errorf("promtool: %s", out)
	}
	url := startPrometheus(t, os.Getenv("METRICS_ADDR"))
	prom := &prometheus{t, url}
	for deadline := time.Now().Add(30 * time.Second); ; ask("b") {
		if n := len(prom.query(`count_over_time(up{job="llm-proxy"}[1m]) >= 4`)); n == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("Prometheus did not scrape: %v", prom.query("up"))
		}
		time.Sleep(200 * time.Millisecond)
	}
	names := prom.names()
	empty := []string{ // no such event happened
		"llm_proxy_unpriced_calls_total",
	}
	for _, q := range queries(t) {
		got := prom.query(q)
		for _, name := range metricNames(q) {
			if !slices.Contains(names, name) && !slices.Contains(empty, name) {
				t.Errorf("there is no metric %s, which %s uses", name, q)
			}
		}
		compares := strings.ContainsAny(q, "<>") || strings.Contains(q, "==")
		if len(got) == 0 && !compares && !slices.ContainsFunc(empty, func(s string) bool { return strings.Contains(q, s) }) {
			t.Errorf("no data: %s", q)
		}
	}
	if firing := prom.query(`ALERTS{alertstate="firing"}`); len(firing) != 0 {
		t.Errorf("alerts: %v", firing)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func get(t *testing.T, url string) string {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("%s: %d %v", url, res.StatusCode, err)
	}
	return string(b)
}

// startPrometheus runs Prometheus with the configuration in deploy/, except for the interval and the target.
func startPrometheus(t *testing.T, target string) string {
	t.Helper()
	dir, addr := t.TempDir(), freeAddress(t)
	config := strings.NewReplacer("15s", "500ms", "llm-proxy:9090", target).Replace(read(t, "../deploy/prometheus.yml"))
	for name, text := range map[string]string{"prometheus.yml": config, "alerts.yml": read(t, "../deploy/alerts.yml")} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("prometheus", "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+addr, "--log.level=error")
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("prometheus: %s", log.String())
		}
	})
	for range 150 {
		if res, err := http.Get("http://" + addr + "/-/ready"); err == nil {
			res.Body.Close()
			if res.StatusCode == 200 {
				return "http://" + addr
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("Prometheus did not start")
	return ""
}

type prometheus struct {
	t   *testing.T
	url string
}

func (p *prometheus) ask(path string, to any) {
	p.t.Helper()
	res, err := http.Get(p.url + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		p.t.Errorf("%s: %d %s %v", path, res.StatusCode, b, err)
		return
	}
	if err := json.Unmarshal(b, to); err != nil {
		p.t.Errorf("%s: %v", path, err)
	}
}

func (p *prometheus) query(q string) []any {
	p.t.Helper()
	var answer struct{ Data struct{ Result []any } }
	p.ask("/api/v1/query?query="+url.QueryEscape(q), &answer)
	return answer.Data.Result
}

func (p *prometheus) names() []string {
	p.t.Helper()
	var answer struct{ Data []string }
	p.ask("/api/v1/label/__name__/values", &answer)
	return answer.Data
}

// queries returns the queries of the dashboard, with its variables filled in, and of the alerts.
func queries(t *testing.T) (out []string) {
	t.Helper()
	fill := strings.NewReplacer("$__rate_interval", "1m", "$instance", ".*")
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Annotations struct{ List []struct{ Expr string } }
	}
	if err := json.Unmarshal([]byte(read(t, "../deploy/grafana/dashboards/llm-proxy.json")), &board); err != nil {
		t.Fatal(err)
	}
	for _, p := range board.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("the panel %s has no query", p.Title)
		}
		for _, target := range p.Targets {
			out = append(out, fill.Replace(target.Expr))
		}
	}
	for _, a := range board.Annotations.List {
		out = append(out, fill.Replace(a.Expr))
	}
	alert := regexp.MustCompile(`(?m)^        expr: (?:\|\n((?:          .*\n)+)|(.*)\n)`)
	for _, m := range alert.FindAllStringSubmatch(read(t, "../deploy/alerts.yml"), -1) {
		out = append(out, strings.TrimSpace(m[1]+m[2]))
	}
	if len(out) < 50 {
		t.Errorf("only %d queries were found", len(out))
	}
	return out
}

func metricNames(q string) []string {
	return regexp.MustCompile(`\b(?:llm_proxy|go|process)_[a-z_]+`).FindAllString(regexp.MustCompile(`"[^"]*"`).ReplaceAllString(q, ""), -1)
}
