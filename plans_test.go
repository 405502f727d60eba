// Every SQL statement of store*.go is read out of the source and its plan asked
// of SQLite: none may walk through all of a table that grows with use.
package main

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A statement is SQL as it stands in the source.
type statement struct{ where, text string }

// sqlSource reads string expressions out of source files: literals, constants
// and what is put together from them with +.
type sqlSource struct {
	t      *testing.T
	files  *token.FileSet
	consts map[string]ast.Expr // by function and name, or name alone outside functions
	read   map[*ast.BasicLit]bool
}

// fold returns the text of an expression, and false if it is not constant.
func (s *sqlSource) fold(scope string, e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		s.read[e] = true
		return text, err == nil && e.Kind == token.STRING
	case *ast.BinaryExpr:
		x, okX := s.fold(scope, e.X)
		y, okY := s.fold(scope, e.Y)
		return x + y, okX && okY && e.Op == token.ADD
	case *ast.Ident:
		for _, name := range []string{scope + "." + e.Name, e.Name} {
			if c := s.consts[name]; c != nil {
				return s.fold(scope, c)
			}
		}
	}
	return "", false
}

// statements walks over a function, or what stands outside of functions, and
// returns the largest constant expressions that are SQL.
func (s *sqlSource) statements(scope string, node ast.Node) (out []statement) {
	verb := regexp.MustCompile(`^\s*(SELECT|INSERT|UPDATE|DELETE|WITH) `)
	ast.Inspect(node, func(n ast.Node) bool {
		if d, ok := n.(*ast.GenDecl); ok && d.Tok == token.CONST {
			return false // a part of others, or used under its name
		}
		e, ok := n.(ast.Expr)
		if !ok {
			return true
		}
		text, ok := s.fold(scope, e)
		if ok && verb.MatchString(text) {
			out = append(out, statement{s.files.Position(e.Pos()).String(), text})
		}
		return !ok
	})
	return out
}

// readStatements returns the statements of store*.go. SQL that it cannot read
// fails the test.
func readStatements(t *testing.T) (out []statement) {
	t.Helper()
	names, err := filepath.Glob("store*.go")
	if err != nil {
		t.Fatal(err)
	}
	s := &sqlSource{t: t, files: token.NewFileSet(), consts: map[string]ast.Expr{}, read: map[*ast.BasicLit]bool{}}
	type part struct {
		scope string
		node  ast.Node
	}
	var parts []part
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") || name == "store_file.go" { // which works on whole databases that nobody serves from
			continue
		}
		file, err := parser.ParseFile(s.files, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			scope := ""
			if f, ok := d.(*ast.FuncDecl); ok {
				scope = name + " " + f.Name.Name
			}
			parts = append(parts, part{scope, d})
			ast.Inspect(d, func(n ast.Node) bool {
				if v, ok := n.(*ast.ValueSpec); ok {
					for i := range v.Values {
						s.consts[strings.TrimPrefix(scope+"."+v.Names[i].Name, ".")] = v.Values[i]
					}
				}
				return true
			})
		}
	}
	for _, p := range parts {
		out = append(out, s.statements(p.scope, p.node)...)
	}
	for _, p := range parts {
		ast.Inspect(p.node, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && !s.read[l] && regexp.MustCompile(`\b(SELECT|INSERT INTO|UPDATE|DELETE FROM)\b`).MatchString(l.Value) {
				t.Errorf("%s: SQL that this test cannot read", s.files.Position(l.Pos()))
			}
			return true
		})
	}
	return out
}

// plan returns the lines of a statement's plan.
func plan(ctx context.Context, st *store, text string) ([]string, error) {
	numbers := regexp.MustCompile(`\?(\d+)`).FindAllStringSubmatch(text, -1)
	count := 0
	for _, m := range numbers {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			return nil, err
		}
		count = max(count, n)
	}
	if len(numbers) == 0 {
		count = strings.Count(text, "?")
	}
	rows, err := st.write.QueryContext(ctx, "EXPLAIN QUERY PLAN "+text, make([]any, count)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var id, parent, unused int
		var detail string
		if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
			return nil, err
		}
		out = append(out, detail)
	}
	return out, rows.Err()
}

// scans returns the lines of a plan that walk through all of a growing table, or
// through all sums of one grain.
func scans(text string, lines []string) (bad []string) {
	growing := map[string]string{}
	for _, m := range regexp.MustCompile(`\b(requests|tokens|usage_sums|project_hours|audit|contents)\b(?: (?:AS )?([a-z]\w*))?`).FindAllStringSubmatch(text, -1) {
		growing[m[1]] = m[1]
		if m[2] != "" {
			growing[m[2]] = m[1]
		}
	}
	for _, line := range lines {
		words := strings.Fields(line)
		if len(words) < 2 || growing[words[1]] == "" {
			continue
		}
		if words[0] == "SCAN" || growing[words[1]] == "usage_sums" && !strings.Contains(line, "(grain=? AND project=?") {
			bad = append(bad, line)
		}
	}
	return bad
}

// TestNoFullScans: see above. The tables of keys, projects, upstreams, prices
// and settings stay small and may be scanned.
func TestNoFullScans(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	statements := readStatements(t)
	if len(statements) < 40 {
		t.Errorf("only %d statements were found", len(statements))
	}
	for _, st := range statements {
		lines, err := plan(t.Context(), p.in.store, st.text)
		if err != nil {
			t.Errorf("%s: %v in %s", st.where, err, st.text)
			continue
		}
		if bad := scans(st.text, lines); len(bad) > 0 {
			t.Errorf("%s: %s\n%s", st.where, strings.Join(bad, "; "), st.text)
		}
	}
	for text, want := range map[string]int{ // the test itself can fail
		`SELECT name FROM tokens WHERE name LIKE ?`: 1, `SELECT 1 FROM requests r WHERE r.model = ?`: 1, `SELECT 1 FROM usage_sums WHERE grain = ? AND at > ?`: 1,
		`DELETE FROM tokens`: 1, `SELECT 1 FROM tokens WHERE seq = ?`: 0, `SELECT 1 FROM usage_sums WHERE grain = ? AND project = ? AND token > ?2`: 0,
		`SELECT name FROM projects WHERE name LIKE ?`: 0, `SELECT 1 FROM (SELECT max(id) AS m FROM requests) JOIN tokens t ON t.seq + 1 = m`: 1,
	} {
		lines, err := plan(t.Context(), p.in.store, text)
		if err != nil || len(scans(text, lines)) != want {
			t.Errorf("%s: %v %v", text, lines, err)
		}
	}
}

// TestRowsStay: no statement changes a call's row, and none but those that let old
// ones go deletes any.
func TestRowsStay(t *testing.T) {
	t.Parallel()
	change, drop := regexp.MustCompile(`(UPDATE|REPLACE INTO) requests\b|INTO requests\b[^;]*ON CONFLICT`), regexp.MustCompile(`DELETE FROM requests\b`)
	drops, inserts := 0, 0
	for _, st := range readStatements(t) {
		if change.MatchString(st.text) {
			t.Errorf("%s changes rows: %s", st.where, st.text)
		}
		if drop.MatchString(st.text) {
			drops++
		}
		if strings.Contains(st.text, "INSERT INTO requests ") {
			inserts++
		}
	}
	if drops != 1 || inserts == 0 {
		t.Errorf("%d statements delete rows and %d make some", drops, inserts)
	}
}
