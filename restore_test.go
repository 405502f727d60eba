// These tests hold backup and restore to their word: a whole copy while calls
// are served, nothing lost and nothing changed by a restore that is refused,
// and a say in what a backup brings back to life.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestBackupUnderLoad: the copy is of one moment, whole, and its owner's alone;
// restored elsewhere with the key, its tokens work.
func TestBackupUnderLoad(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var clients sync.WaitGroup
	end := make(chan struct{})
	for range 3 {
		clients.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
					p.chat()
				}
			}
		})
	}
	file := filepath.Join(p.dir, "backup.db")
	waitFor(t, "some calls", func() bool { _, _, ended := p.sizes(); return ended > 0 })
	out, err := runProgram(t, p.env, "backup", file)
	close(end)
	clients.Wait()
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the backup: %v %v", info, err)
	}
	st, err := openReadOnly(file, true)
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	var calls, counted, settled, summed int64
	if err := st.read.QueryRow(`SELECT (SELECT count(*) FROM requests WHERE outcome <> 'refused'), (SELECT sum(request_count) FROM tokens),
		(SELECT count(*) FROM requests WHERE outcome <> 'open'), (SELECT coalesce(sum(calls), 0) FROM usage_sums WHERE grain = 'day' AND token <> 0)`).
		Scan(&calls, &counted, &settled, &summed); err != nil {
		t.Fatal(err)
	}
	if calls == 0 || calls != counted || settled != summed {
		t.Errorf("the copy is not of one moment: %d calls, %d counted; %d settled, %d summed", calls, counted, settled, summed)
	}
	for _, want := range []string{file, "1 projects", "1 tokens", fmt.Sprintf("%d calls", calls), p.in.sealer.id()} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %q", want, out)
		}
	}

	elsewhere := serveEnv(t)
	elsewhere["ENCRYPTION_KEY_FILE"] = filepath.Join(p.env["DATA_DIR"], keyName)
	if out, err = runProgram(t, elsewhere, "restore", file, "--revoke=none"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if info, err = os.Stat(filepath.Join(elsewhere["DATA_DIR"], "llm-proxy.db")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the restored database: %v %v", info, err)
	}
	s := serveProgram(t, elsewhere)
	p.provider.answer(modelsScript)
	if got := s.status(t, "/v1/models", p.token); got != 200 {
		t.Errorf("a token of the backup: %d", got)
	}
	if got := s.status(t, "/manage/projects", p.adminKey); got != 200 || len(s.out.bytes()) > 0 {
		t.Errorf("a management key of the backup: %d", got)
	}
}

func modelsScript(c *providerConn, _ recorded) bool {
	return c.reply(200, `{"object":"list","data":[]}`)
}

// TestBackupRefused: what is there stays, what failed leaves nothing.
func TestBackupRefused(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	there := filepath.Join(p.dir, "there")
	if err := os.WriteFile(there, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(p.dir, "link")
	if err := os.Symlink(filepath.Join(p.dir, "target"), link); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{there, link, filepath.Join(p.dir, "none", "x"), p.dir} {
		if out, err := runProgram(t, p.env, "backup", file); err == nil {
			t.Errorf("backup %s: %s", file, out)
		}
	}
	if b, err := os.ReadFile(there); err != nil || string(b) != "precious" {
		t.Errorf("the file that was there: %q %v", b, err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	damage(t, p.in.cfg.databaseFile)
	fresh := filepath.Join(p.dir, "fresh.db")
	if out, err := runProgram(t, p.env, "backup", fresh); err == nil || !strings.Contains(err.Error(), "no backup was made") {
		t.Errorf("backup of a damaged database: %v %s", err, out)
	}
	if err := os.Remove(p.in.cfg.databaseFile); err != nil {
		t.Fatal(err)
	}
	if _, err := runProgram(t, p.env, "backup", fresh); err == nil || !strings.Contains(err.Error(), "there is no database") {
		t.Errorf("backup of nothing: %v", err)
	}
	if left, _ := filepath.Glob(fresh + "*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// damage overwrites pages in the middle of a database file.
func damage(t *testing.T, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil || len(b) < 16<<10 {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	for i := 4096; i < len(b)-4096; i++ {
		b[i] ^= 0xa5
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// contents are the names and sums of the files in a directory that matter.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(e.Name(), "-shm") || strings.HasSuffix(e.Name(), "-wal") && len(b) == 0 {
			continue // of those who only looked
		}
		files[e.Name()] = fmt.Sprintf("%x", sha256.Sum256(b))
	}
	return files
}

// A restoreTest is a stopped proxy whose backup is older than what was revoked.
type restoreTest struct {
	*testProxy
	backup string
	tokens map[string]string // by what became of them since
	keys   map[string]string
}

func newRestoreTest(t *testing.T) *restoreTest {
	r := &restoreTest{testProxy: newTest(t, nil), tokens: map[string]string{}, keys: map[string]string{}}
	ids := map[string]string{}
	for _, name := range []string{"kept", "revoked", "rotated", "shortened", "used", "before"} {
		ids[name], r.tokens[name] = r.newToken(`"name":"` + name + `","max_requests":2`)
	}
	r.manage("DELETE", "/manage/tokens/"+ids["before"], "", 200, nil)
	for _, name := range []string{"kept", "revoked", "lowered"} {
		var v struct{ ID, Key string }
		r.manage("POST", "/manage/keys", `{"name":"`+name+`","role":"admin"}`, 201, &v)
		ids["key "+name], r.keys[name] = v.ID, v.Key
		r.secrets = append(r.secrets, v.Key)
	}
	r.backup = filepath.Join(r.dir, "backup.db")
	if out, err := runProgram(t, r.env, "backup", r.backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var rotated struct{ Token string }
	r.manage("DELETE", "/manage/tokens/"+ids["revoked"], "", 200, nil)
	r.manage("POST", "/manage/tokens/"+ids["rotated"]+"/rotate", `{"overlap_minutes":0}`, 200, &rotated)
	r.manage("PATCH", "/manage/tokens/"+ids["shortened"], `{"expires_at":"`+time.Now().Add(1500*time.Millisecond).UTC().Format(time.RFC3339Nano)+`"}`, 200, nil)
	r.manage("DELETE", "/manage/keys/"+ids["key revoked"], "", 200, nil)
	r.manage("PATCH", "/manage/keys/"+ids["key lowered"], `{"role":"viewer"}`, 200, nil)
	r.tokens["new value"] = rotated.Token
	_, r.tokens["made since"] = r.newToken(`"name":"made since"`)
	r.provider.answer(modelsScript)
	for range 2 {
		r.do("GET", "/v1/models", "", "Authorization", "Bearer "+r.tokens["used"])
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestRestoreChoices is UP7: a backup from before a revocation. Nothing happens
// until the operator says what becomes of what was revoked since.
func TestRestoreChoices(t *testing.T) {
	t.Parallel()
	r := newRestoreTest(t)
	before := contents(t, r.env["DATA_DIR"])
	out, err := runProgram(t, r.env, "restore", r.backup)
	if err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Fatalf("without a choice: %v", err)
	}
	for _, want := range []string{"makes 1 tokens valid again that are revoked", "makes 1 tokens valid again with the value", "makes 1 tokens valid for longer",
		"makes 1 tokens whose count", "makes 2 management keys", "makes 0 projects", "makes 1 valid tokens unknown",
		"become valid again", "--revoke=since", "--revoke=all", "--revoke=none"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %s", want, out)
		}
	}
	if after := contents(t, r.env["DATA_DIR"]); !maps.Equal(before, after) {
		t.Errorf("a restore that was refused left %v, before %v", after, before)
	}
	for _, tt := range []struct {
		choice string
		tokens map[string]int
		keys   map[string]int // POST /manage/keys, for admins only
	}{
		{"none", map[string]int{"kept": 200, "revoked": 200, "rotated": 200, "shortened": 200, "used": 200, "before": 401, "new value": 401, "made since": 401},
			map[string]int{"kept": 200, "revoked": 200, "lowered": 200}},
		{"since", map[string]int{"kept": 200, "revoked": 401, "rotated": 401, "shortened": 401, "used": 429, "before": 401, "new value": 401, "made since": 401},
			map[string]int{"kept": 200, "revoked": 401, "lowered": 403}},
		{"all", map[string]int{"kept": 401, "revoked": 401, "rotated": 401, "shortened": 401, "used": 401, "before": 401, "new value": 401, "made since": 401},
			map[string]int{"kept": 401, "revoked": 401, "lowered": 401}},
	} {
		t.Run(tt.choice, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			if err := os.CopyFS(dir, os.DirFS(r.env["DATA_DIR"])); err != nil {
				t.Fatal(err)
			}
			// The lock file names the database by its path.
			env := maps.Clone(r.env)
			env["DATA_DIR"], env["LISTEN_ADDR"] = dir, "127.0.0.1:0"
			out, err := runProgram(t, env, "restore", "--revoke="+tt.choice, r.backup)
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			aside, _ := filepath.Glob(filepath.Join(dir, "llm-proxy.db.before-restore-*Z"))
			if len(aside) != 1 || !strings.Contains(out, aside[0]) {
				t.Fatalf("moved aside: %v; %s", aside, out)
			}
			if f, err := examine(t.Context(), aside[0]); err != nil || f.tokens != 8 {
				t.Errorf("the database from before: %+v %v", f, err)
			}
			s := serveProgram(t, env)
			waitFor(t, "the shortened token's end", func() bool {
				return tt.choice != "since" || s.status(t, "/v1/models", r.tokens["shortened"]) == 401
			})
			for name, want := range tt.tokens {
				if got := s.status(t, "/v1/models", r.tokens[name]); got != want {
					t.Errorf("the token %q: %d, want %d", name, got, want)
				}
			}
			for name, want := range tt.keys {
				if got := s.status(t, "/manage/keys", r.keys[name]); got != want {
					t.Errorf("the key %q: %d, want %d", name, got, want)
				}
			}
			if tt.choice == "all" {
				if got := s.status(t, "/manage/keys", printed(t, keyPrefix, out)); got != 200 {
					t.Errorf("the new key: %d", got)
				}
			} else if strings.Contains(out, keyPrefix) {
				t.Errorf("a key is in %s", out)
			}
		})
	}
}

// TestRestoreRefused: whatever is wrong with a backup shows before anything is
// touched.
func TestRestoreRefused(t *testing.T) {
	t.Parallel()
	r := newRestoreTest(t)
	good, err := os.ReadFile(r.backup)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, b []byte) string {
		name = filepath.Join(r.dir, name)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	damaged := file("damaged", good)
	damage(t, damaged)
	newer := append([]byte(nil), good...)
	newer[63] = 200 // user_version, big-endian at 60
	old := append([]byte(nil), good...)
	copy(old[60:64], []byte{0, 0, 0, 0})
	withLog := file("with-log", good)
	file("with-log-wal", []byte("x"))
	wrongKey := map[string]string{"ENCRYPTION_KEY": goodKey}
	before := contents(t, r.env["DATA_DIR"])
	for _, tt := range []struct {
		name, file, want string
		env              map[string]string
	}{
		{"missing", filepath.Join(r.dir, "none"), "no such file", nil},
		{"damaged", damaged, "cannot be used", nil},
		{"cut", file("cut", good[:len(good)/2]), "cannot be used", nil},
		{"text", file("text", []byte("not a database, not at all")), "cannot be used", nil},
		{"empty", file("empty", nil), "cannot be used", nil},
		{"newer", file("newer", newer), "newer llm-proxy", nil},
		{"not ours", file("not-ours", old), "not a database of llm-proxy", nil},
		{"a copy in use", withLog, "only llm-proxy backup makes whole copies", nil},
		{"itself", r.in.cfg.databaseFile, "is the database itself", nil},
		{"a directory", r.dir, "is a directory", nil},
		{"wrong key", r.backup, "the encryption key is not the one", wrongKey},
	} {
		env := maps.Clone(r.env)
		maps.Copy(env, tt.env)
		out, err := runProgram(t, env, "restore", tt.file, "--revoke=none")
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "nothing was changed") {
			t.Errorf("%s: %v %s", tt.name, err, out)
		}
		if after := contents(t, r.env["DATA_DIR"]); !maps.Equal(before, after) {
			t.Errorf("%s: left %v", tt.name, after)
		}
	}
	fresh := serveEnv(t)
	if _, err := runProgram(t, fresh, "restore", r.backup, "--revoke=none"); err == nil || !strings.Contains(err.Error(), "the encryption key is missing") {
		t.Errorf("without a key: %v", err)
	}
	if after := contents(t, fresh["DATA_DIR"]); len(after) != 1 { // the lock file
		t.Errorf("without a key: left %v", after)
	}
	r.start()
	if _, err := runProgram(t, r.env, "restore", r.backup, "--revoke=none"); err == nil || !strings.Contains(err.Error(), "another llm-proxy is using") {
		t.Errorf("with the server running: %v", err)
	}
}

// TestRestoreAfterTrouble: a current database that is damaged, gone, or left
// half-way by a restore that was killed.
func TestRestoreAfterTrouble(t *testing.T) {
	t.Parallel()
	r := newRestoreTest(t)
	file := r.in.cfg.databaseFile
	restore := func(choice string) (string, error) {
		return runProgram(t, r.env, "restore", r.backup, "--revoke="+choice)
	}
	damage(t, file)
	r.allowErrors = true
	if out, err := restore("since"); err == nil || !strings.Contains(out, "cannot be read") || !strings.Contains(err.Error(), "needs a current database") {
		t.Errorf("since, beside a damaged database: %v %s", err, out)
	}
	if out, err := restore("none"); err != nil {
		t.Fatalf("none, beside a damaged database: %v %s", err, out)
	}
	// Killed between moving the old one away and the new one in: no database,
	// a stale log, and the copy.
	for _, suffix := range []string{"-wal", "-shm", ".restoring", ".restoring-wal"} {
		if err := os.WriteFile(file+suffix, []byte("stale"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := runProgram(t, r.env, "serve"); err == nil || !strings.Contains(err.Error(), "is missing or empty") {
		t.Errorf("a start without the database: %v", err)
	}
	if out, err := restore("since"); err == nil || !strings.Contains(out, "There is no current database") {
		t.Errorf("since, without a database: %v %s", err, out)
	}
	if out, err := restore("none"); err != nil {
		t.Fatalf("none, without a database: %v %s", err, out)
	}
	if left, _ := filepath.Glob(file + ".restoring*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	r.start()
	var tokens struct{ Data []json.RawMessage }
	r.manage("GET", "/manage/tokens", "", 200, &tokens)
	if len(tokens.Data) != 7 {
		t.Errorf("%d tokens after the restore", len(tokens.Data))
	}
}
