// These tests hold the structure of the source: which file may use what, what none may use,
// the sizes of files, functions and lines, and every place where a secret becomes a string.
package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// A buildVariant says which files of the program a test examines: those of the default build, of the build with the tag
// postgres, or all.
type buildVariant int

const (
	allBuilds buildVariant = iota
	defaultBuild
	postgresBuild
)

// eachBuild runs a test that type-checks the source for both builds.
func eachBuild(t *testing.T, test func(*testing.T, buildVariant)) {
	t.Parallel()
	for name, b := range map[string]buildVariant{"default": defaultBuild, "postgres": postgresBuild} {
		t.Run(name, func(t *testing.T) { test(t, b) })
	}
}

// buildTag returns the build constraint of a file, "" if it has none.
func buildTag(t *testing.T, name string) string {
	t.Helper()
	first, _, _ := strings.Cut(mustReadFile(t, name), "\n")
	tag, _ := strings.CutPrefix(first, "//go:build ")
	if tag == first {
		return ""
	}
	if tag != "postgres" && tag != "!postgres" {
		t.Errorf("%s has the build constraint %s", name, tag)
	}
	return tag
}

// parseSources parses the program's own files, without tests.
func parseSources(t *testing.T, fset *token.FileSet, mode parser.Mode, b buildVariant) map[string]*ast.File {
	t.Helper()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]*ast.File{}
	for _, name := range names {
		tag := buildTag(t, name)
		if strings.HasSuffix(name, "_test.go") || tag == "postgres" && b == defaultBuild ||
			tag == "!postgres" && b == postgresBuild {
			continue
		}
		if files[name], err = parser.ParseFile(fset, name, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if len(files) < 20 {
		t.Fatalf("only %d files found", len(files))
	}
	return files
}

func matchesFile(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { ok, _ := filepath.Match(p, name); return ok })
}

// TestLayoutImports: only these files import these packages. The list also shows reviewers
// what each file can do.
func TestLayoutImports(t *testing.T) {
	t.Parallel()
	only := map[string][]string{
		"database/sql":        {"store*.go", "cluster.go"}, // cluster.go for a connection
		"database/sql/driver": {"store_ledger.go", "store_sums.go", "store_postgres.go"},
		"modernc.org/sqlite":  {"store.go"},
		"github.com/lib/pq":   {"store_postgres.go"}, // with the tag postgres only
		"net/http/httputil":   {"proxy.go"},
		"html/template":       {"admin*.go"},
		"os": {"main.go", "datadir.go", "demo.go", "host.go", "command*.go",
			"outbox.go"},
		"os/signal":       {"main.go"},
		"syscall":         {"main.go", "datadir.go", "upstream.go", "host.go", "outbox.go"},
		"crypto/rand":     {"secrets.go", "tokens.go"},
		"crypto/tls":      {"config.go", "host.go", "command.go", "command_doctor.go"},
		"runtime/debug":   {"main.go", "config.go", "host.go"},
		"runtime/metrics": {"main.go", "metrics.go"},
		"llm-proxy/demo":  {"demo.go"},
		"os/exec":         {},
		"unsafe":          {},
		"reflect":         {},
		"plugin":          {},
		"text/template":   {},
		"net/rpc":         {},
		"encoding/gob":    {},
		"net/http/pprof":  {},
		"expvar":          {},
	}
	plain := []string{"domain.go", "attribution.go", "billing.go", "meter*.go", "prices.go", "request_*.go",
		"endpoints.go", "policy.go", "metrics.go", "audit.go", "ratelimit.go", "ratelimit_values.go",
		"ratelimit_leases.go", "upstream_select.go",
		"upstream_errors.go"}
	notInPlain := []string{"net", "net/http", "database/sql", "os", "syscall", "log/slog"}
	used := map[string]bool{}
	for name, file := range parseSources(t, token.NewFileSet(), parser.ImportsOnly, allBuilds) {
		for _, spec := range file.Imports {
			path := strings.Trim(spec.Path.Value, `"`)
			if files, ok := only[path]; ok && !matchesFile(files, name) {
				t.Errorf("%s imports %s, which is for %v only", name, path, files)
			}
			if matchesFile(plain, name) && slices.Contains(notInPlain, path) {
				t.Errorf("%s may not do I/O, but imports %s", name, path)
			}
			if strings.Contains(path, ".") && only[path] == nil {
				t.Errorf("%s imports %s: not the standard library", name, path)
			}
			if strings.HasPrefix(path, "llm-proxy/") && only[path] == nil {
				t.Errorf("%s imports %s: the program is one package", name, path)
			}
			for _, f := range only[path] {
				if matchesFile([]string{f}, name) {
					used[path+" "+f] = true
				}
			}
		}
	}
	for path, files := range only {
		for _, f := range files {
			if !used[path+" "+f] {
				t.Errorf("%s no longer imports %s: remove it from the list", f, path)
			}
		}
	}
}

// TestLayoutDemo: the stand-in provider uses nothing of the program and cannot
// open a file, a connection or a process.
func TestLayoutDemo(t *testing.T) {
	t.Parallel()
	allowed := []string{"bytes", "cmp", "crypto/subtle", "encoding/base64", "encoding/binary", "encoding/json",
		"errors", "fmt",
		"hash/fnv", "image", "image/color", "image/png", "io", "maps", "math", "math/rand/v2", "mime",
		"mime/multipart", "net/http",
		"slices", "strconv", "strings", "sync", "time"}
	notHTTP := []string{"Get", "Post", "PostForm", "Head", "Client", "Transport", "DefaultClient", "ListenAndServe",
		"Serve", "FileServer", "Dir"}
	names, err := filepath.Glob("demo/*.go")
	if err != nil || len(names) < 4 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range file.Imports {
			if path := strings.Trim(spec.Path.Value, `"`); !slices.Contains(allowed, path) {
				t.Errorf("%s imports %s", name, path)
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				if id, ok := s.X.(*ast.Ident); ok && id.Name == "http" && slices.Contains(notHTTP, s.Sel.Name) {
					t.Errorf("%s uses http.%s", name, s.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestLayoutModule: there is one direct dependency, and one more with the build tag postgres, which no file without the
// tag imports.
func TestLayoutModule(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var direct []string
	block := false
	for line := range strings.SplitSeq(string(text), "\n") {
		line = strings.TrimSpace(line)
		rest, single := strings.CutPrefix(line, "require ")
		switch {
		case line == "require (" || line == ")":
			block = line != ")"
		case (single || block) && line != "" && !strings.HasPrefix(line, "//") &&
			!strings.HasSuffix(line, "// indirect"):
			direct = append(direct, strings.Fields(rest)[0])
		case strings.HasPrefix(line, "replace") || strings.HasPrefix(line, "tool"):
			t.Errorf("go.mod has %s", line)
		}
	}
	if !slices.Equal(direct, []string{"github.com/lib/pq", "modernc.org/sqlite"}) {
		t.Errorf("direct dependencies: %v", direct)
	}
	for name, file := range parseSources(t, token.NewFileSet(), parser.ImportsOnly, defaultBuild) {
		for _, spec := range file.Imports {
			if strings.Contains(spec.Path.Value, "lib/pq") {
				t.Errorf("%s imports %s without the build tag postgres", name, spec.Path.Value)
			}
		}
	}
}

// sizeExceptions are the source files outside 150-700 lines, with the reason.
func sizeExceptions() map[string]string {
	return map[string]string{
		"store_nopostgres.go":   "it stands in for four functions",
		"ratelimit_nokeeper.go": "it stands in for the keeper of leases",
	}
}

// stillWide are the files that still have lines above 120 columns. The list may only shrink.
func stillWide() []string {
	return []string{
		"calls_test.go", "content_test.go",
		"harness_test.go",
		"meter_test.go",
		"prices_test.go",
		"proxy_request_test.go", "proxy_test.go",
		"request_test.go",
	}
}

// TestLayoutFiles: at most 83 source files (and 12 with a build tag) of 150-700 lines, whose functions and lines fit on
// a screen. Each opens with a comment about what it does; nothing runs before main, and nothing
// is exported that an interface does not require.
func TestLayoutFiles(t *testing.T) {
	t.Parallel()
	const maxFiles, maxTaggedFiles, minLines, maxLines, maxFunctionLines = 83, 12, 150, 700, 60
	interfaces := []string{"ServeHTTP", "Header", "Write", "WriteHeader", "Unwrap", "Scan", "Flush", "FlushError",
		"Read",
		"ReadFrom", "Close", "Get", "Put", "RoundTrip", "Error", "String", "Is", "Format", "LogValue", "MarshalText",
		"MarshalJSON", "UnmarshalJSON",
		// of database/sql/driver and net
		"Connect", "ExecContext", "QueryContext", "PrepareContext", "Prepare", "NumInput", "Dial", "DialTimeout",
		"DialContext", "IsValid", "Accept", "Addr"}
	fset := token.NewFileSet()
	files := parseSources(t, fset, parser.ParseComments, allBuilds)
	tagged := 0
	for name := range files {
		if buildTag(t, name) != "" {
			tagged++
		}
	}
	if len(files)-tagged > maxFiles || tagged > maxTaggedFiles {
		t.Errorf("%d source files, and %d with a build tag; merge some", len(files)-tagged, tagged)
	}
	for name, file := range files {
		n := fset.File(file.Pos()).LineCount() - 1
		if n > maxLines || n < minLines && sizeExceptions()[name] == "" {
			t.Errorf("%s has %d lines", name, n)
		}
		if file.Doc == nil && (len(file.Comments) == 0 || file.Comments[0].Pos() > file.Package) {
			t.Errorf("%s does not start with a comment", name)
		}
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				first, last := fset.Position(d.Pos()), fset.Position(d.End())
				if n := last.Line - first.Line + 1; n > maxFunctionLines {
					t.Errorf("%s: %s has %d lines", first, d.Name.Name, n)
				}
				if d.Name.Name == "init" && d.Recv == nil {
					t.Errorf("%s has a func init", name)
				}
				if d.Name.IsExported() && (d.Recv == nil || !slices.Contains(interfaces, d.Name.Name)) {
					t.Errorf("%s exports %s", name, d.Name.Name)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					for _, id := range declaredIdents(s) {
						if id.IsExported() {
							t.Errorf("%s exports %s", name, id.Name)
						}
					}
				}
			}
		}
	}
}

// TestLayoutLines: no line is wider than 120 columns, with tabs as 4.
func TestLayoutLines(t *testing.T) {
	t.Parallel()
	const maxColumns = 120
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	demo, err := filepath.Glob("demo/*.go")
	if err != nil || len(demo) == 0 {
		t.Fatal(err)
	}
	for _, name := range append(names, demo...) {
		if slices.Contains(stillWide(), name) {
			continue
		}
		for n, line := range strings.Split(mustReadFile(t, name), "\n") {
			if w := utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    ")); w > maxColumns {
				t.Errorf("%s:%d has %d columns", name, n+1, w)
			}
		}
	}
}

// TestLayoutWords: identifiers are made of the field's words (CONTRIBUTING.md has the glossary),
// not of private ones.
func TestLayoutWords(t *testing.T) {
	t.Parallel()
	private := strings.Fields("room rooms house houses wither withers tries wish wishes verdict verdicts patience " +
		"union begun " +
		"note notes noted fate fates hold holds held measure measures measured span spans act acts fact facts told " +
		"tell tells " +
		"know knows stranger strangers mend anew")
	allowed := []string{"note", "Note", // a field of upstreams in the management API
		"spanID"} // of W3C trace context
	still := map[string][]string{} // identifiers that are still to be renamed; the list may only shrink
	words := regexp.MustCompile(`[A-Z]+[a-z]*|[a-z]+`)
	fset := token.NewFileSet()
	files := parseSources(t, fset, parser.SkipObjectResolution, allBuilds)
	demo, err := filepath.Glob("demo/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range demo {
		if !strings.HasSuffix(name, "_test.go") {
			if files[name], err = parser.ParseFile(fset, name, nil, parser.SkipObjectResolution); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, file := range files {
		ast.Inspect(file, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			if !ok || slices.Contains(allowed, id.Name) || slices.Contains(still[name], id.Name) {
				return true
			}
			for _, w := range words.FindAllString(id.Name, -1) {
				if slices.Contains(private, strings.ToLower(w)) {
					t.Errorf("%s: the name %s has the word %q", fset.Position(id.Pos()), id.Name, w)
				}
			}
			return true
		})
	}
}

func declaredIdents(s ast.Spec) []*ast.Ident {
	switch s := s.(type) {
	case *ast.TypeSpec:
		return []*ast.Ident{s.Name}
	case *ast.ValueSpec:
		return s.Names
	}
	return nil
}

// TestLayoutAudit: what administrators manage is changed through store.withAuditedTx
// alone, which puts it into the audit trail.
func TestLayoutAudit(t *testing.T) {
	t.Parallel()
	fset := token.NewFileSet()
	for name, file := range parseSources(t, fset, parser.SkipObjectResolution, allBuilds) {
		if !matchesFile([]string{"store_projects.go", "store_tokens.go"}, name) {
			continue
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && (s.Sel.Name == "writeDB" || s.Sel.Name == "withTx") {
				t.Errorf("%s goes around store.withAuditedTx", fset.Position(s.Pos()))
			}
			return true
		})
	}
}

// TestLayoutSecrets: calling a value of type secret reveals it. These are all the calls, by
// file; reviewers check a new one before it is added here. A secret may not be converted to a
// plain func either.
func TestLayoutSecrets(t *testing.T) { eachBuild(t, testLayoutSecrets) }

func testLayoutSecrets(t *testing.T, b buildVariant) {
	want := map[string]int{
		"admin_session.go": 1, // binding a session to MANAGEMENT_TOKEN
		// masking a provider's key in what the provider says
		"proxy_response.go": 1, "proxy_settle.go": 1,
		"audit.go":           2, // the key of the audit trail: deriving it, using it
		"command_restore.go": 2, // the new management key after --revoke=all; a new encryption key, into its file
		"datadir.go":         2, // the encryption key: into its file, into the sealer
		"demo.go":            4, // the stand-in provider's key, and what the newcomer is shown
		"main.go":            3, // the first start shows a key and a token once; the header of a call of the playground
		"manage.go":          1, // comparing MANAGEMENT_TOKEN
		"manage_projects.go": 3, // checking the form of a provider key; showing new credentials once
		"manage_usage.go":    2, // showing stored content
		"tokens.go":          1, // hashing new credentials
		// sealing, the hint; deriving keys from that of stored content; a cached answer; the signature of a webhook
		"secrets.go":  6,
		"upstream.go": 5, // the header of a call to the provider; the URL of a webhook

		"manage_notifications.go": 1, // showing the new secret of a webhook once
	}
	if b == postgresBuild {
		want["store_postgres.go"] = 2 // DATABASE_URL and the database's password, to connect
	}
	got := openedSecrets(t, b)
	if !maps.Equal(got, want) {
		t.Errorf("secrets are opened in %v, but the list is %v", got, want)
	}
}

// openedSecrets returns how many calls open a value of type secret, by file. It fails the test if
// one is converted.
func openedSecrets(t *testing.T, b buildVariant) map[string]int {
	t.Helper()
	fset, files, info := typeCheck(t, b)
	got := map[string]int{}
	for name := range files {
		ast.Inspect(files[name], func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			tv := info.Types[call.Fun]
			if !tv.IsType() && isSecret(tv.Type) {
				got[name]++
			}
			if tv.IsType() && !isSecret(tv.Type) && len(call.Args) == 1 && isSecret(info.Types[call.Args[0]].Type) {
				t.Errorf("%s converts a secret", fset.Position(call.Pos()))
			}
			return true
		})
	}
	return got
}

// typeCheck parses and type-checks the program. Imported packages stay empty; the errors that
// follow from that do not matter here.
func typeCheck(t *testing.T, b buildVariant) (*token.FileSet, map[string]*ast.File, *types.Info) {
	t.Helper()
	fset := token.NewFileSet()
	files := parseSources(t, fset, parser.SkipObjectResolution, b)
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: emptyImporter{}, Error: func(error) {}}
	var parsed []*ast.File
	for _, name := range slices.Sorted(maps.Keys(files)) {
		parsed = append(parsed, files[name])
	}
	_, _ = conf.Check("main", fset, parsed, info)
	return fset, files, info
}

// layers lists the files of each layer, the lowest first. A file may use what its own layer and
// lower layers declare.
func layers() [][]string {
	return [][]string{
		{"domain.go", "billing.go", "errors.go", "secrets.go", "logging.go", "audit.go",
			"attribution.go"},
		{"store*.go", "cluster.go"},
		{"config.go", "datadir.go", "host.go", "request_*.go", "endpoints.go", "meter*.go", "prices.go", "metrics.go",
			"policy.go", "ratelimit*.go",
			"tokens.go", "upstream*.go", "ledger.go", "outbox.go",
			"cache.go", "notifications.go"},
		{"proxy*.go", "manage*.go"},
		{"admin*.go", "charts.go", "command*.go"},
		{"demo.go", "server.go", "main.go"},
	}
}

// layerOf returns the layer of a file, -1 if it has none.
func layerOf(name string) int {
	return slices.IndexFunc(layers(), func(patterns []string) bool { return matchesFile(patterns, name) })
}

// TestLayoutLayers: no file uses a function, type, method or field of a higher layer.
func TestLayoutLayers(t *testing.T) { eachBuild(t, testLayoutLayers) }

func testLayoutLayers(t *testing.T, b buildVariant) {
	fset, files, info := typeCheck(t, b)
	for name := range files {
		if layerOf(name) < 0 {
			t.Errorf("%s is in no layer", name)
		}
	}
	uses := 0
	for id, o := range info.Uses {
		if v, ok := o.(*types.Var); o.Pkg() == nil || o.Pkg().Path() != "main" || ok && !v.IsField() &&
			v.Parent() != o.Pkg().Scope() {
			continue
		}
		uses++
		from, to := fset.Position(id.Pos()), fset.Position(o.Pos()).Filename
		if layerOf(from.Filename) < layerOf(to) {
			t.Errorf("%s uses %s, which %s in a higher layer declares", from, o.Name(), to)
		}
	}
	if uses < 10_000 {
		t.Errorf("only %d uses were found", uses)
	}
}

func isSecret(t types.Type) bool {
	named, ok := t.(*types.Named)
	return ok && named.Obj().Name() == "secret" && named.Obj().Pkg().Path() == "main"
}

type emptyImporter struct{}

func (emptyImporter) Import(path string) (*types.Package, error) {
	if path == "unsafe" {
		return types.Unsafe, nil
	}
	p := types.NewPackage(path, path[strings.LastIndexByte(path, '/')+1:])
	p.MarkComplete()
	return p, nil
}

// TestLayoutConstructors: main.go gives every part of the program all that it requires.
func TestLayoutConstructors(t *testing.T) { eachBuild(t, testLayoutConstructors) }

func testLayoutConstructors(t *testing.T, b buildVariant) {
	_, files, info := typeCheck(t, b)
	seen := 0
	ast.Inspect(files["main.go"], func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		named, ok := info.Types[lit].Type.(*types.Named)
		checked := []string{"proxyDeps", "operations", "manageAPI", "adminDeps", "exporter"}
		if !ok || !slices.Contains(checked, named.Obj().Name()) {
			return true
		}
		seen++
		if fields := named.Underlying().(*types.Struct).NumFields(); len(lit.Elts) != fields {
			t.Errorf("%s sets %d of %d fields of %s", "main.go", len(lit.Elts), fields, named.Obj().Name())
		}
		return true
	})
	if seen != 5 {
		t.Errorf("%d constructors were found", seen)
	}
}

// TestLayoutForbidden (SC4): only the listed files contain these texts; most appear nowhere.
func TestLayoutForbidden(t *testing.T) {
	t.Parallel()
	allowed := map[string][]string{
		"InsecureSkipVerify": nil, "http.DefaultClient": nil, "http.DefaultTransport": nil, "http.Get(": nil,
		"http.Post(": nil, "Director:": nil,
		"math/rand\"": nil, "template.JS(": nil, "template.URL(": nil, "template.CSS(": nil, "context.WithValue": nil,
		"recover()": nil, "MD5": nil, "sha1": nil,
		"template.HTML(": nil,
		"os.Exit(":       {"main.go"}, // main itself
		// not to clients of a real server; and our own words about a field
		"err.Error()":    {"command_doctor.go", "manage_projects.go", "manage_notifications.go"},
		"apiError{":      {"errors.go"}, // the catalogue of errors
		"http.ListenAnd": nil,
	}
	for name := range parseSources(t, token.NewFileSet(), 0, allBuilds) {
		for n, line := range strings.Split(mustReadFile(t, name), "\n") {
			code, _, _ := strings.Cut(line, "//")
			for text, files := range allowed {
				if strings.Contains(code, text) && !slices.Contains(files, name) {
					t.Errorf("%s:%d has %s", name, n+1, text)
				}
			}
			// A limit for io.ReadAll must be on the same line.
			if strings.Contains(code, "io.ReadAll(") && !strings.Contains(code, "LimitReader") &&
				!strings.Contains(code, "MaxBytesReader") {
				t.Errorf("%s:%d reads without a limit on the same line", name, n+1)
			}
		}
	}
}
