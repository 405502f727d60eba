// This room turns data into HTML: it reads the embedded templates once and
// serves the style sheet, the script and the icon. What templates may call is
// here; they hold no rule of their own, and html/template escapes all that they
// print.
package main

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"
)

//go:embed templates/*.html templates/static/*
var pageFiles embed.FS

// A pageSet is all templates, and the static files by the names under which
// pages link to them.
type pageSet struct {
	templates   func() (map[string]*template.Template, error) // by name; read when first asked for
	files       map[string]staticFile                         // by name with a hash of what is in it
	hashedNames map[string]string                             // that name, by the file's own
}

type staticFile struct {
	body        []byte
	contentType string
}

// newPageSet reads the static files. Templates take some 20 ms and 4 MB, which
// a program that nobody administers should not.
func newPageSet() (*pageSet, error) {
	ps := &pageSet{files: map[string]staticFile{}, hashedNames: map[string]string{}}
	names, err := fs.Glob(pageFiles, "templates/static/*")
	if err != nil {
		return nil, fmt.Errorf("listing static files: %w", err)
	}
	for _, name := range names {
		body, err := pageFiles.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
		sum, ext := sha256.Sum256(body), path.Ext(name)
		hashed := strings.TrimSuffix(path.Base(name), ext) + "." + hex.EncodeToString(sum[:6]) + ext
		ps.files[hashed] = staticFile{body, mime.TypeByExtension(ext)}
		ps.hashedNames[path.Base(name)] = hashed
	}
	ps.templates = sync.OnceValues(ps.readTemplates)
	return ps, nil
}

// readTemplates reads the pages. Each is layout.html and parts.html with a
// template "content" of its own.
func (ps *pageSet) readTemplates() (map[string]*template.Template, error) {
	out := map[string]*template.Template{}
	base, err := template.New("").Funcs(ps.funcs()).ParseFS(pageFiles, "templates/layout.html", "templates/parts.html")
	if err != nil {
		return nil, fmt.Errorf("reading the layout: %w", err)
	}
	names, err := fs.Glob(pageFiles, "templates/*.html")
	if err != nil {
		return nil, fmt.Errorf("listing templates: %w", err)
	}
	for _, name := range names {
		if name == "templates/layout.html" || name == "templates/parts.html" {
			continue
		}
		t, err := base.Clone()
		if err == nil {
			t, err = t.ParseFS(pageFiles, name)
		}
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
		out[strings.TrimSuffix(path.Base(name), ".html")] = t
	}
	return out, nil
}

// render writes the page made from a template.
func (ps *pageSet) render(w io.Writer, name string, v *pageView) error {
	all, err := ps.templates()
	if err != nil {
		return err
	}
	t := all[name]
	if t == nil {
		return fmt.Errorf("there is no template %q", name)
	}
	if err := t.ExecuteTemplate(w, "layout", v); err != nil {
		return fmt.Errorf("template %q: %w", name, err)
	}
	return nil
}

// handleStatic serves a file by its hashed name, which never means another text.
func (ui *adminUI) handleStatic(w http.ResponseWriter, r *http.Request) {
	f, ok := ui.pages.files[r.PathValue("name")]
	if !ok {
		ui.writeErrorPage(w, r, manageError(errNotFound))
		return
	}
	h := w.Header()
	h.Set("Content-Type", f.contentType)
	h.Set("Content-Length", strconv.Itoa(len(f.body)))
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	_, _ = w.Write(f.body)
}

// funcs is what templates may call besides html/template's own.
func (ps *pageSet) funcs() template.FuncMap {
	return template.FuncMap{
		"static": func(name string) (string, error) {
			if ps.hashedNames[name] == "" {
				return "", fmt.Errorf("there is no static file %q", name)
			}
			return "/admin/static/" + ps.hashedNames[name], nil
		},
		"fieldID": fieldID,
		"when":    newTimeView,  // a *stamp or stamp; see template "time"
		"number":  formatNumber, // 1,234,567
		"usd":     formatUSD,    // dollars: $1,234.50
		"ms":      formatMillis,
		"bytes":   formatBytes,
		"curl":    curlSnippet, "python": pythonSnippet, "node": nodeSnippet, "golang": goSnippet,
		"plural": pluralize, // plural 3 "token" "tokens": 3 tokens
		"list":   func(items ...any) []any { return items },
		"price":  func(v *json.RawMessage) string { return formatQuantity(string(*v), true) },
	}
}

// A timeView is a time as a page shows it.
type timeView struct{ ISO, Text, Exact, Date, Clock, Relative string }

// newTimeView returns how a time is shown, or nil for none.
func newTimeView(v any) (*timeView, error) {
	var at time.Time
	switch v := v.(type) {
	case timestamp:
		at = time.UnixMilli(int64(v))
	case *timestamp:
		if v == nil {
			return nil, nil
		}
		at = time.UnixMilli(int64(*v))
	default:
		return nil, fmt.Errorf("%T is no time", v)
	}
	at = at.UTC()
	return &timeView{at.Format(time.RFC3339), at.Format("2006-01-02 15:04"), at.Format("2006-01-02 15:04:05"), at.Format("2006-01-02"), at.Format("15:04:05"), relativeTime(time.Until(at))}, nil
}

// relativeTime says how far off a time is.
func relativeTime(d time.Duration) string {
	ago := d < 0
	if ago {
		d = -d
	}
	text := ""
	switch {
	case d < time.Minute:
		text = pluralize(int64(d/time.Second), "second", "seconds")
	case d < time.Hour:
		text = pluralize(int64(d/time.Minute), "minute", "minutes")
	case d < 48*time.Hour:
		text = pluralize(int64(d/time.Hour), "hour", "hours")
	case d < 2*365*24*time.Hour:
		text = pluralize(int64(d/(24*time.Hour)), "day", "days")
	default:
		text = pluralize(int64(d/(365*24*time.Hour)), "year", "years")
	}
	if ago {
		return text + " ago"
	}
	return "in " + text
}

func pluralize(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return groupDigits(n) + " " + many
}

// groupDigits writes a number with a comma every three digits.
func groupDigits(n int64) string {
	digits := strconv.FormatInt(n, 10)
	sign := ""
	if digits[0] == '-' {
		sign, digits = "-", digits[1:]
	}
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return sign + digits
}

// formatNumber groups any of the whole numbers that pages show.
func formatNumber(v any) (string, error) {
	switch v := v.(type) {
	case int64:
		return groupDigits(v), nil
	case *int64:
		if v == nil {
			return "–", nil
		}
		return groupDigits(*v), nil
	case int:
		return groupDigits(int64(v)), nil
	}
	return "", fmt.Errorf("%T is no whole number", v)
}

// formatUSD writes any of the amounts of money that pages show.
func formatUSD(v any) (string, error) {
	var nanos int64
	switch v := v.(type) {
	case dollars:
		nanos = int64(v)
	case *dollars:
		if v == nil {
			return "–", nil
		}
		nanos = int64(*v)
	case int64:
		nanos = v
	default:
		return "", fmt.Errorf("%T is no money", v)
	}
	return formatMoney(nanos), nil
}

// formatMoney writes nano-dollars with two decimals, or as many as a small amount
// needs.
func formatMoney(nanos int64) string {
	sign, magnitude := "", nanos
	if nanos < 0 {
		sign, magnitude = "-", -nanos
	}
	places, unit := 2, int64(10_000_000)
	if magnitude > 0 && magnitude < 1_000_000_000 { // below a dollar cents say too little
		places, unit = 4, 100_000
		if magnitude < 100_000 {
			places, unit = 6, 1000
		}
	}
	if magnitude > 0 && magnitude < 500 {
		return sign + "<$0.000001"
	}
	rounded := (magnitude + unit/2) / unit
	scale := int64(1)
	for range places {
		scale *= 10
	}
	return fmt.Sprintf("%s$%s.%0*d", sign, groupDigits(rounded/scale), places, rounded%scale)
}

// formatMillis writes a number of milliseconds.
func formatMillis(v *float64) string {
	switch {
	case v == nil:
		return "–"
	case *v < 10:
		return strconv.FormatFloat(*v, 'f', 1, 64) + " ms"
	case *v < 10_000:
		return strconv.FormatFloat(*v, 'f', 0, 64) + " ms"
	}
	return strconv.FormatFloat(*v/1000, 'f', 1, 64) + " s"
}

// formatBytes writes a size with one decimal.
func formatBytes(n int64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for len(units) > 1 && f >= 1024 {
		f, units = f/1024, units[1:]
	}
	if units[0] == "B" {
		return strconv.FormatInt(n, 10) + " B"
	}
	return strconv.FormatFloat(f, 'f', 1, 64) + " " + units[0]
}
