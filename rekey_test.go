// Tests of a change of the encryption key: everything opens with the new key and
// nothing with the old one, whatever interrupts it.
package main

import (
	"bytes"
	"encoding/base64"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// keyFile is where the key of a proxy without a setting for it lives.
func (p *testProxy) keyFile() string { return filepath.Join(p.env["DATA_DIR"], keyName) }

// sealedWith counts the traces of a key in the database file and beside it.
func (p *testProxy) sealedWith(kid [8]byte) (n int) {
	p.t.Helper()
	files, err := filepath.Glob(p.in.cfg.databaseFile + "*")
	if err != nil {
		p.t.Fatal(err)
	}
	head := append([]byte{sealVersion}, kid[:]...)
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			p.t.Fatal(err)
		}
		n += bytes.Count(text, head) + bytes.Count(text, []byte(base64.StdEncoding.EncodeToString(head)))
	}
	return n
}

// TestRekey (KC13): provider keys, the audit trail and kept content open with the
// new key; of what the old one sealed nothing is left in the file.
func TestRekey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.keep()
	for range 20 {
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"u","priority":5,"api_key":"`+p.provider.key+`"}`, 201, nil)
	}
	p.chat()
	before := p.lastCall()
	old := p.in.sealer
	if out, err := runProgram(t, p.env, "rekey"); err == nil || !strings.Contains(err.Error(), "another llm-proxy is using") {
		t.Errorf("while serving: %v %s", err, out)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	was, err := os.ReadFile(p.keyFile())
	if err != nil || p.sealedWith(old.kid) == 0 {
		t.Fatal("the test does not find what is sealed: ", err)
	}
	out, err := runProgram(t, p.env, "rekey")
	if err != nil || !strings.Contains(out, "21 provider keys") || strings.Contains(out, strings.TrimSpace(string(was))) {
		t.Fatalf("%v %s", err, out)
	}
	if n := p.sealedWith(old.kid); n != 0 {
		t.Errorf("%d traces of the old key are left", n)
	}
	now, err := os.ReadFile(p.keyFile())
	if info, e := os.Stat(p.keyFile()); err != nil || e != nil || info.Mode().Perm() != 0o600 || bytes.Equal(now, was) {
		t.Errorf("the key file: %v %v", err, e)
	}
	if _, err := os.Stat(filepath.Join(p.env["DATA_DIR"], newKeyName)); err == nil {
		t.Error("the new key lies there twice")
	}
	p.start()
	if res := p.chat(); res.status != 200 || p.provider.last(t).header.Get("Authorization") != "Bearer "+p.provider.key {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if v := p.contentOf(before.ID); v.Request.Text == nil || !strings.Contains(*v.Request.Text, promptCanary) {
		t.Error("kept content is lost")
	}
	k := p.verifyTrail()
	entries, err := p.in.store.auditPage(t.Context(), 0, 1<<60)
	if err != nil || !k.intact() || entries[len(entries)-1].action != actionReveal || entries[len(entries)-2].action != actionRekey {
		t.Errorf("the trail: %v %v", k.problems, err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.keyFile(), was, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openInstance(t.Context(), p.in.cfg, p.in.log); err == nil || !strings.Contains(err.Error(), "not the one") {
		t.Errorf("it starts with the old key: %v", err)
	}
}

// TestRekeyFile: a key from a setting is changed to one in a file of the
// operator's, and the two do not get mixed up.
func TestRekeyFile(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"ENCRYPTION_KEY": goodKey})
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string {
		name = filepath.Join(p.dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	next := file("next", strings.Repeat("0123456789abcdef", 3)+"fedcba9876543210\n")
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "stands in a setting"},
		{[]string{"--force"}, rekeyUsage},
		{[]string{next, next}, rekeyUsage},
		{[]string{filepath.Join(p.dir, "none")}, "cannot be read"},
		{[]string{file("short", "abc")}, "must be 32 random bytes"},
		{[]string{file("same", goodKey)}, "is the one that is in use"},
	} {
		if out, err := runProgram(t, p.env, append([]string{"rekey"}, c.args...)...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v %s", c.args, err, out)
		}
	}
	wrong := file("wrong", strings.Repeat("7654a210fedcba98", 2)+strings.Repeat("13579bdf02468ace", 2))
	env := map[string]string{"ENCRYPTION_KEY": strings.Repeat("a1b2c3d4e5f60718", 2) + strings.Repeat("293a4b5c6d7e8f90", 2), "DATA_DIR": p.env["DATA_DIR"]}
	if _, err := runProgram(t, env, "rekey", wrong); err == nil || !strings.Contains(err.Error(), "not the one") {
		t.Errorf("with a key that opens nothing: %v", err)
	}
	for range 2 { // the second finds nothing to do
		if out, err := runProgram(t, p.env, "rekey", next); err != nil || !strings.Contains(out, "ENCRYPTION_KEY_FILE="+next) {
			t.Errorf("%v %s", err, out)
		}
	}
	delete(p.env, "ENCRYPTION_KEY")
	p.env["ENCRYPTION_KEY_FILE"] = next
	p.start()
	if res := p.chat(); res.status != 200 {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestRekeyBroken: a row that does not open stops the change before anything is
// changed, and is named.
func TestRekeyBroken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if _, err := p.in.store.write.Exec(`UPDATE upstreams SET base_url = 'https://elsewhere.example.com/v1'`); err != nil {
		t.Fatal(err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := runProgram(t, p.env, "rekey"); err == nil || !strings.Contains(err.Error(), p.upstream) || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("got %v", err)
	}
	// The new key that was not needed does no harm; the change is not half done.
	p.start()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, map[string]string{"DATA_DIR": t.TempDir()}, "rekey"); err == nil || !strings.Contains(err.Error(), "there is no database") {
		t.Errorf("without a database: %v %s", err, out)
	}
}

// TestRekeyKilled (KC13): killed at any moment, the change is finished by the
// next run, and at no time are there rows of both keys.
func TestRekeyKilled(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for range 30 {
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"u","api_key":"`+p.provider.key+`"}`, 201, nil)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	command := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0], "rekey")
		cmd.Env = []string{"LLM_PROXY_TEST_PROGRAM=with arguments", "DATA_DIR=" + p.env["DATA_DIR"]}
		return cmd
	}
	begin := time.Now()
	if out, err := command().CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	takes := time.Since(begin)
	for range 12 {
		cmd := command()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(takes + takes/4))
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if out, err := command().CombinedOutput(); err != nil {
			t.Fatalf("after a kill: %v %s", err, out)
		}
		p.start()
		if res := p.chat(); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		if ups, err := p.in.store.upstreamsOf(t.Context(), p.in.registry.projects[1].state.Load().seq); err != nil || len(ups) != 31 {
			t.Errorf("%d upstreams: %v", len(ups), err)
		} else {
			for i := range ups {
				if u := newUpstream(&ups[i], p.in.sealer, true, p.in.registry.health); u.broken != nil {
					t.Errorf("upstream %s: %v", u.id, u.broken)
				}
			}
		}
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRekeyInterrupted: a start in the middle of a change says what to do.
func TestRekeyInterrupted(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	was, err := os.ReadFile(p.keyFile())
	if err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "rekey"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	next := filepath.Join(p.env["DATA_DIR"], newKeyName) // as if it had ended before the last step
	if err := os.Rename(p.keyFile(), next); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.keyFile(), was, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openInstance(t.Context(), p.in.cfg, p.in.log); err == nil || !strings.Contains(err.Error(), "finish it with: llm-proxy rekey") {
		t.Errorf("the start says %v", err)
	}
	if out, err := runProgram(t, p.env, "rekey"); err != nil || !strings.Contains(out, "1 provider keys") {
		t.Errorf("%v %s", err, out)
	}
	if err := os.WriteFile(next, nil, 0o600); err != nil { // cut short at its first step
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "rekey"); err != nil {
		t.Errorf("%v %s", err, out)
	}
	p.start()
	if res := p.chat(); res.status != 200 {
		t.Errorf("got %d %s", res.status, res.body)
	}
}
