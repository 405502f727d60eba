// This file tests the container image. It builds the image from the Dockerfile if buildah is installed, and runs its
// program from the image's own files, as the image's user, in a chroot. It needs no registry and no daemon.
package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A builder is buildah with separate storage.
type builder struct {
	t   *testing.T
	dir string
}

func newBuilder(t *testing.T) *builder {
	t.Helper()
	for _, tool := range []string{"buildah", "busybox", "bash", "tar"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed: the image is not built", tool)
		}
	}
	if os.Getuid() != 0 || runtime.GOOS != "linux" {
		t.Skip("building in a chroot needs root on Linux: the image is not built")
	}
	b := &builder{t, t.TempDir()}
	t.Cleanup(func() { _ = exec.Command("buildah", append(b.storage(), "rm", "--all")...).Run() })
	return b
}

func (b *builder) storage() []string {
	return []string{"--root", filepath.Join(b.dir, "root"), "--runroot", filepath.Join(b.dir, "run"), "--storage-driver", "vfs"}
}

func (b *builder) run(args ...string) string {
	b.t.Helper()
	cmd := exec.Command("buildah", append(b.storage(), args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		b.t.Fatalf("buildah %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v", name, args, err)
	}
	return strings.TrimSpace(string(out))
}

// goImage makes a substitute for the image golang:… from this machine's compiler and a shell, so that nothing has to be
// fetched.
func (b *builder) goImage() string {
	root, goroot := filepath.Join(b.dir, "base"), command(b.t, "go", "env", "GOROOT")
	for _, dir := range []string{"bin", "etc/ssl/certs", "tmp", "usr/local/go"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			b.t.Fatal(err)
		}
	}
	// Only what a build needs, as each step of the build copies all of it.
	pack := "tar -C " + goroot + " -c --exclude=src/cmd --exclude=testdata --exclude='*_test.go' src pkg/include bin/go VERSION go.env " +
		"$(cd " + goroot + " && ls -d pkg/tool/*/asm pkg/tool/*/compile pkg/tool/*/link) | tar -C " + filepath.Join(root, "usr/local/go") + " -x"
	command(b.t, "bash", "-c", "set -o pipefail; "+pack)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		b.t.Fatal(err)
	}
	command(b.t, "cp", "-L", busybox, filepath.Join(root, "bin/busybox"))
	command(b.t, "cp", "-L", "/etc/ssl/certs/ca-certificates.crt", filepath.Join(root, "etc/ssl/certs"))
	for _, tool := range []string{"sh", "cp", "mkdir", "true"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", tool)); err != nil {
			b.t.Fatal(err)
		}
	}
	c := b.run("from", "scratch")
	b.run("copy", "-q", c, root, "/")
	b.run("config", "--env", "PATH=/usr/local/go/bin:/bin", "--env", "GOPATH=/go", "--env", "GOTOOLCHAIN=local", c)
	b.run("commit", "-q", c, "localhost/golang:here")
	b.run("rm", c)
	return "localhost/golang:here"
}

// build builds a target of the Dockerfile, "" for the last, and returns the directory with its files. volumes are the caches
// of this machine's compiler.
func (b *builder) build(goImage, target, tag string, volumes ...string) (root string) {
	b.t.Helper()
	args := []string{"bud", "-q", "--isolation", "chroot", "--pull-never", "--layers=false", "--format", "docker", "--timestamp", "0",
		"--build-arg", "GO_IMAGE=" + goImage, "--build-arg", "VERSION=v0.0.0-e2e", "-v", command(b.t, "go", "env", "GOMODCACHE") + ":/go/pkg/mod", "-t", tag}
	for _, v := range volumes {
		args = append(args, "-v", v)
	}
	if target != "" {
		args = append(args, "--target", target)
	}
	b.run(append(args, "..")...)
	return b.run("mount", b.run("from", tag))
}

// TestContainer: the image contains one program, the certificates and /data, and nothing else. The program runs as the
// image's user, becomes healthy, and stops cleanly.
func TestContainer(t *testing.T) {
	b := newBuilder(t)
	base := b.goImage()
	cache := command(t, "go", "env", "GOCACHE") + ":/root/.cache/go-build"
	root := b.build(base, "", "localhost/llm-proxy:one", cache)
	b.checkFiles(root)
	b.checkConfig("localhost/llm-proxy:one")
	t.Run("serves", func(t *testing.T) { serveImage(t, root) })
	t.Run("postgres", func(t *testing.T) { // the other target has support for PostgreSQL, and is the same in all else
		root := b.build(base, "postgres", "localhost/llm-proxy:postgres", cache)
		b.checkFiles(root)
		b.checkConfig("localhost/llm-proxy:postgres")
		serveImage(t, root)
	})
	for name, want := range map[string]bool{"one": false, "postgres": true} {
		if got := hasPostgres(t, b.run("mount", b.run("from", "localhost/llm-proxy:"+name))); got != want {
			t.Errorf("the image %s has support for PostgreSQL: %v", name, got)
		}
	}
	t.Run("again", func(t *testing.T) { // the same bytes, although everything is compiled again
		if one, two := hashOf(t, root), hashOf(t, b.build(base, "", "localhost/llm-proxy:two")); one != two {
			t.Errorf("two builds differ: %s, %s", one, two)
		}
	})
}

// hasPostgres reports whether an image's program can use PostgreSQL.
func hasPostgres(t *testing.T, root string) bool {
	t.Helper()
	out, err := exec.Command("go", "version", "-m", filepath.Join(root, "llm-proxy")).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(out), "github.com/lib/pq")
}

func hashOf(t *testing.T, root string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "llm-proxy"))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(text))
}

func (b *builder) checkFiles(root string) {
	var files []string
	var size int64
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, root)
		if name == "/data" {
			st := info.Sys().(*syscall.Stat_t)
			if st.Uid != 65532 || st.Gid != 65532 || info.Mode().Perm() != 0o700 {
				b.t.Errorf("/data is %v of %d:%d", info.Mode(), st.Uid, st.Gid)
			}
		}
		if !d.IsDir() {
			files, size = append(files, name), size+info.Size()
		}
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	slices.Sort(files)
	if want := []string{"/etc/ssl/certs/ca-certificates.crt", "/llm-proxy"}; !slices.Equal(files, want) {
		b.t.Errorf("the image has %v, want %v", files, want)
	}
	b.t.Logf("the image has %d bytes", size)
	if size > 25_000_000 {
		b.t.Errorf("the image is larger than 25 MB")
	}
}

func (b *builder) checkConfig(tag string) {
	var image struct {
		Docker struct {
			Config struct {
				User, WorkingDir, StopSignal string
				Env, Entrypoint              []string
				Volumes                      map[string]any
				ExposedPorts                 map[string]any
				Healthcheck                  struct{ Test []string }
			} `json:"config"`
		}
	}
	if err := json.Unmarshal([]byte(b.run("inspect", "--type", "image", tag)), &image); err != nil {
		b.t.Fatal(err)
	}
	c := image.Docker.Config
	if c.User != "65532:65532" || c.WorkingDir != "/data" || c.Volumes["/data"] == nil || c.ExposedPorts["8080/tcp"] == nil ||
		!slices.Equal(c.Entrypoint, []string{"/llm-proxy"}) || !slices.Equal(c.Healthcheck.Test, []string{"CMD", "/llm-proxy", "healthcheck"}) ||
		!slices.Contains(c.Env, "LISTEN_ADDR=:8080") || !slices.Contains(c.Env, "DATA_DIR=/data") {
		b.t.Errorf("the image is configured as %+v", c)
	}
}

// serveImage runs the image's program as a container would: with its files, its user and its settings, except for the port.
func serveImage(t *testing.T, root string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	program := func(args ...string) *exec.Cmd {
		cmd := exec.Command("/llm-proxy", args...)
		cmd.Dir = "/data"
		cmd.Env = []string{"LISTEN_ADDR=" + addr, "DATA_DIR=/data", "TMPDIR=/data", "MANAGEMENT_TOKEN=" + managementToken}
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
		return cmd
	}
	server := program()
	var log bytes.Buffer
	server.Stderr = &log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Process.Kill() }()
	healthy := false
	for range 200 {
		if healthy = program("healthcheck").Run() == nil; healthy {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if !healthy {
		t.Fatalf("the program did not become healthy: %s", log.String())
	}
	res, err := http.Get("http://" + addr + "/readyz")
	if err != nil || res.StatusCode != 200 {
		t.Errorf("/readyz: %v %v", res, err)
	}
	res.Body.Close()
	if out, err := program("version").CombinedOutput(); err != nil || !strings.Contains(string(out), "v0.0.0-e2e") {
		t.Errorf("version: %s %v", out, err)
	}
	if out, err := program("backup", "/data/backup.db").CombinedOutput(); err != nil || !strings.Contains(string(out), "The backup is complete") {
		t.Errorf("backup: %s %v", out, err)
	}
	if out, err := program("doctor").CombinedOutput(); err != nil {
		t.Errorf("doctor: %s %v", out, err)
	}
	if err := server.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(); err != nil {
		t.Errorf("the program ended with %v: %s", err, log.String())
	}
	if info, err := os.Stat(filepath.Join(root, "data", "llm-proxy.db")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the database: %v %v", info, err)
	}
}
