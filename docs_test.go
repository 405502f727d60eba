// The documents are held to the program: the settings table of README is the
// one of config.go, and the tests that SECURITY.md names are there.
package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestReadmeSettings: README has each setting with its default and its help, in
// order, and no other. The failing test prints the table as it should be.
func TestReadmeSettings(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| setting | default | |\n| --- | --- | --- |\n")
	for _, s := range settings() {
		def := "-"
		if s.def != "" {
			def = "`" + s.def + "`"
		}
		table.WriteString("| `" + s.name + "` | " + def + " | " + s.help + " |\n")
	}
	if !strings.Contains(string(readme), "\n"+table.String()+"\n") {
		t.Errorf("README.md does not have this table of settings:\n%s", table.String())
	}
	if n := strings.Count(string(readme), "\n"); n > 210 {
		t.Errorf("README.md has %d lines; longer matters go to docs/", n)
	}
}

// TestSecurityNamesTests: each test that SECURITY.md names exists, so that no
// threat is only said to be tested.
func TestSecurityNamesTests(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				have[fn.Name.Name] = true
			}
		}
	}
	for _, name := range regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`").FindAllStringSubmatch(string(text), -1) {
		if !have[name[1]] {
			t.Errorf("SECURITY.md names %s, which does not exist", name[1])
		}
	}
}

// TestAuditDocNamesActions: docs/audit.md and openapi.yaml have each action that
// an entry can have.
func TestAuditDocNamesActions(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	spec := readSpec(t)
	described, _ := spec.at(spec.root, "components", "schemas", "AuditEntry", "properties", "action")["description"].(string)
	actions := []string{actionBegin, actionRestore, actionRekey, actionSignIn, actionSignInFailed, actionSignOut, actionExport, actionReveal}
	for _, m := range mutations(nil) {
		actions = append(actions, m.action)
	}
	for _, a := range actions {
		if !strings.Contains(string(doc), "`"+a+"`") {
			t.Errorf("docs/audit.md does not have the action %s", a)
		}
		thing, verb, _ := strings.Cut(a, ".")
		if _, list, ok := strings.Cut(described, " "+thing); !ok || !strings.Contains(strings.SplitN(list, ";", 2)[0], verb) {
			t.Errorf("openapi.yaml does not have the action %s", a)
		}
	}
}
