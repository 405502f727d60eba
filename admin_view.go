// This file turns data into HTML: it parses the embedded templates once, serves the static files, has
// the functions that templates call, says in the words of a form what is wrong with it, and finds the limits that are
// nearly used up. Templates only format; html/template escapes whatever they print.
package main

import (
	"cmp"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"math"
	"mime"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

//go:embed templates
var pageFiles embed.FS

// A pageSet holds the templates and the static files.
type pageSet struct {
	templates   func() (map[string]*template.Template, error) // by page; parsed on first use
	files       map[string]staticFile                         // by name with a hash of the content
	hashedNames map[string]string                             // by plain name
}

type staticFile struct {
	body        []byte
	contentType string
}

// newPageSet reads the static files. Templates are parsed on first use: that takes some 20 ms and 4
// MB, which a proxy without visitors of /admin need not spend.
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

// readTemplates parses the pages. Each is a template "content" together with templates/parts.
func (ps *pageSet) readTemplates() (map[string]*template.Template, error) {
	base, err := template.New("").Funcs(ps.funcs()).ParseFS(pageFiles, "templates/parts/*.html")
	if err != nil {
		return nil, fmt.Errorf("parsing the shared templates: %w", err)
	}
	names, err := fs.Glob(pageFiles, "templates/*.html")
	if err != nil {
		return nil, fmt.Errorf("listing templates: %w", err)
	}
	pages := map[string]*template.Template{}
	for _, name := range names {
		t, err := base.Clone()
		if err == nil {
			t, err = t.ParseFS(pageFiles, name)
		}
		if err != nil {
			return nil, fmt.Errorf("parsing %s: %w", name, err)
		}
		pages[strings.TrimSuffix(path.Base(name), ".html")] = t
	}
	return pages, nil
}

// render writes a page.
func (ps *pageSet) render(w io.Writer, name string, v *pageView) error {
	pages, err := ps.templates()
	if err != nil {
		return err
	}
	t := pages[name]
	if t == nil {
		return fmt.Errorf("no template %q", name)
	}
	if err := t.ExecuteTemplate(w, "layout", v); err != nil {
		return fmt.Errorf("template %q: %w", name, err)
	}
	return nil
}

// handleStatic serves a file by its hashed name, whose content never changes.
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

// funcs returns what templates may call besides html/template's own functions.
func (ps *pageSet) funcs() template.FuncMap {
	return template.FuncMap{
		"static": func(name string) (string, error) {
			if ps.hashedNames[name] == "" {
				return "", fmt.Errorf("no static file %q", name)
			}
			return "/admin/static/" + ps.hashedNames[name], nil
		},
		"fieldID":    fieldID,
		"outcome":    outcomeLabel,
		"when":       newTimeView,  // for the templates "time", "ago" and "exact"
		"number":     formatNumber, // 1,234,567
		"usd":        formatUSD,    // $1,234.50; takes dollars or *dollars
		"exactUSD":   func(v dollars) string { return formatPrice(formatNanos(int64(v))) },
		"ms":         formatMillis,
		"millis":     formatLongTime,
		"seconds":    func(n int64) string { return describeDuration(time.Duration(n) * time.Second) },
		"share":      func(v float64) string { return percent(100 * v) },
		"bytes":      formatBytes,
		"capitalize": capitalize,
		"textParts":  textParts,
		"plural":     pluralize, // plural 3 "token" "tokens": 3 tokens
		"list":       func(items ...any) []any { return items },
		"price":      func(v *json.RawMessage) string { return formatPrice(string(*v)) },
	}
}

// An option is one choice of a select.
type option struct{ Value, Label string }

// options returns options from pairs of value and label.
func options(pairs ...string) (list []option) {
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, option{pairs[i], pairs[i+1]})
	}
	return list
}

// A timeView is a time in the formats that pages use.
type timeView struct{ ISO, Text, Exact, Date, Clock, Relative string }

// newTimeView formats a timestamp or *timestamp; it returns nil for a nil one.
func newTimeView(v any) (*timeView, error) {
	var at time.Time
	switch v := v.(type) {
	case timestamp:
		at = time.UnixMilli(int64(v)).UTC()
	case *timestamp:
		if v == nil {
			return nil, nil
		}
		at = time.UnixMilli(int64(*v)).UTC()
	default:
		return nil, fmt.Errorf("%T is not a time", v)
	}
	return &timeView{ISO: at.Format(time.RFC3339), Text: at.Format("2006-01-02 15:04"), Date: at.Format(time.DateOnly),
		Exact: at.Format(time.DateTime), Clock: at.Format(time.TimeOnly), Relative: relativeTime(time.Until(at))}, nil
}

// relativeTime returns a duration from now as text, rounded to the nearest unit, such as "in 3 days" or "3 days
// ago".
func relativeTime(d time.Duration) string {
	const day = 24 * time.Hour
	text := ""
	for _, u := range []struct {
		below, unit time.Duration
		name        string
	}{
		{time.Minute, time.Second, "second"}, {time.Hour, time.Minute, "minute"}, {2 * day, time.Hour, "hour"},
		{2 * 365 * day, day, "day"}, {math.MaxInt64, 365 * day, "year"},
	} {
		if rounded := d.Abs().Round(u.unit); rounded < u.below {
			text = pluralize(int64(rounded/u.unit), u.name, u.name+"s")
			break
		}
	}
	if text == "0 seconds" {
		return "now"
	}
	if d < 0 {
		return text + " ago"
	}
	return "in " + text
}

func capitalize(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}

// formatNumber formats an int, an int64 or a *int64.
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
	return "", fmt.Errorf("%T is not a whole number", v)
}

// formatUSD formats dollars or *dollars.
func formatUSD(v any) (string, error) {
	switch v := v.(type) {
	case dollars:
		return formatMoney(int64(v)), nil
	case *dollars:
		if v == nil {
			return "–", nil
		}
		return formatMoney(int64(*v)), nil
	}
	return "", fmt.Errorf("%T is no amount of money", v)
}

// formatLongTime formats a number of milliseconds that may be hours.
func formatLongTime(ms float64) string {
	if ms < 120_000 {
		return unitMillis.format(ms)
	}
	const longest = 100 * 365 * 24 * time.Hour // far below the largest Duration
	return describeDuration(time.Duration(min(ms, float64(longest.Milliseconds()))) * time.Millisecond)
}

// formatMillis formats a number of milliseconds.
func formatMillis(v *float64) string {
	if v == nil {
		return "–"
	}
	return unitMillis.format(*v)
}

// formatBytes formats a size with one decimal.
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

// formatPrice formats an exact price, a decimal number of dollars, with all its decimals but at least two.
func formatPrice(raw string) string {
	text, isNegative := strings.CutPrefix(raw, "-")
	whole, decimals, _ := strings.Cut(text, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return raw
	}
	sign := ""
	if isNegative {
		sign = "−"
	}
	return sign + "$" + groupDigits(n) + "." + (decimals + "00")[:max(2, len(decimals))]
}

func percent(v float64) string {
	if v > 0 && v < 0.1 {
		return "<0.1%"
	}
	return strconv.FormatFloat(v, 'f', 1, 64) + "%"
}

func formatSigned(v float64) string {
	if v < 0 {
		return "−" + formatTwoDecimals(-v)
	}
	return "+" + formatTwoDecimals(v)
}

// formatPointChange formats the change of a percentage, in percentage points.
func formatPointChange(v float64) string {
	if v = math.Round(v*10) / 10; v == 0 {
		return "±0"
	}
	return formatSigned(v) + " points"
}

// formatPercentChange formats a change in percent. It returns "" if there is nothing to compare with.
func formatPercentChange(now, was float64) string {
	if was <= 0 {
		return ""
	}
	switch v := math.Round(100 * (now - was) / was); {
	case v == 0:
		return "±0%"
	case v > 999:
		return "×" + formatTwoDecimals(math.Round(now/was))
	default:
		return formatSigned(v) + "%"
	}
}

// A formMistake is a line of the summary above a form, and the HTML id of the input that it links to.
type formMistake struct{ InputID, Text string }

// showErrors puts each mistake of err beside its field and into the summary above the form, and returns the status
// of the page. Other errors come back.
func (f *pageForm) showErrors(err error, policy *policyForm) (status int, other error) {
	for _, err := range splitMistakes(err) {
		if policy != nil && policy.showError(f, err) {
			status = max(status, http.StatusBadRequest)
			continue
		}
		s, err := f.showError(err)
		if err != nil {
			return 0, err
		}
		status = max(status, s)
	}
	f.focusFirstMistake(policy)
	return status, nil
}

// splitMistakes returns the mistakes that are joined in an error; the error itself if it is anything else.
func splitMistakes(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	parts := joined.Unwrap()
	for _, part := range parts {
		if _, ok := errors.AsType[*fieldError](part); !ok {
			return []error{err}
		}
	}
	return parts
}

// showError shows one mistake.
func (f *pageForm) showError(err error) (int, error) {
	if errors.Is(err, errTaken) {
		err = &fieldError{"name", "is already taken"}
	}
	if errors.Is(err, errStale) {
		f.Problem = "Someone else changed this while you had the form open. Open it again to see the change. " +
			"Your input is still here."
		return http.StatusConflict, nil
	}
	fe, ok := errors.AsType[*fieldError](err)
	if !ok {
		if e, ok := errors.AsType[*apiError](err); ok && e.status == http.StatusBadRequest {
			f.Problem = f.inWords(e.msg)
			return http.StatusBadRequest, nil
		}
		return 0, err
	}
	name, msg, _ := strings.Cut(fe.msg, " ") // of a mistake in an object that the form has fields for
	if !f.showFieldError(f.Fields, fe) && !f.showFieldError(f.Fields, &fieldError{name, msg}) {
		f.Problem = capitalize(f.inWords(fieldErrorMessage(fe)))
	}
	return http.StatusBadRequest, nil
}

// showFieldError shows a mistake beside its field, if that is one of fields, and reports whether it is.
func (f *pageForm) showFieldError(fields []*formField, fe *fieldError) bool {
	i := slices.IndexFunc(fields, func(field *formField) bool {
		return field.Name == fe.param || strings.HasPrefix(fe.param, field.Name+"[") // an entry of a list
	})
	if i < 0 {
		return false
	}
	fields[i].Error = fields[i].Label + " " + f.inWords(strings.TrimSuffix(fe.msg, ".")) + "."
	f.Mistakes = append(f.Mistakes, formMistake{fieldID(fields[i].Name), fields[i].Error})
	return true
}

// inWords replaces the words of the API in a message by those of the form: the labels of its fields, and an empty
// field for null.
func (f *pageForm) inWords(msg string) string {
	words := []string{"or null", "or empty", "not null", "not empty"}
	for _, field := range f.Fields {
		if strings.Contains(field.Name, "_") {
			words = append(words, field.Name, "“"+field.Label+"”")
		}
	}
	return strings.NewReplacer(words...).Replace(msg)
}

// focusFirstMistake gives the focus to the first input with a mistake.
func (f *pageForm) focusFirstMistake(policy *policyForm) {
	fields := f.Fields
	if policy != nil {
		fields = append(slices.Clone(fields), policy.fields()...)
	}
	for _, field := range fields {
		if field.Error != "" {
			field.Focus = true
			return
		}
	}
	if policy == nil {
		return
	}
	for _, row := range policy.Limits {
		if row.Error != "" {
			row.Focus = true
			return
		}
	}
}

// limitFieldLabel returns the label of a limit's field.
func limitFieldLabel(name string) string {
	switch name {
	case "count":
		return "Metric"
	case "max":
		return "Maximum"
	case "per":
		return "Period"
	case "shadow":
		return "Monitor only"
	case "for_each":
		return "For each"
	case "max_values":
		return "Values"
	}
	return capitalize(name)
}

// limitWords replaces the words of the API in a message about a limit by those of the form.
func limitWords() *strings.Replacer {
	return strings.NewReplacer("lifetime", "in total", "or concurrent", "or concurrent calls",
		"with concurrent,", "with concurrent calls:", "limits with for_each", "limits for each value")
}

// A dashPeriod is the time that a dashboard covers: whole steps up to the one that has begun, and the period before.
type dashPeriod struct {
	name, title      string
	fromDay, toDay   string // of a range of days, as it was asked for
	stepMS           int64  // milliseconds
	from, to         int64  // to is at most the end of the step that has begun
	prevFrom, prevTo int64  // as much of the period before as has passed of this one
	grain            string
}

// newPeriod returns the period from a time up to another; the one before began at prevFrom.
func newPeriod(name, title string, now, from, to, prevFrom int64) dashPeriod {
	p := dashPeriod{name: name, title: title, from: from, prevFrom: prevFrom, stepMS: hourMS, grain: "hour"}
	switch length := to - from; {
	case length > 14*dayMS:
		p.stepMS, p.grain = dayMS, "day"
	case length > 2*dayMS:
		p.stepMS = 6 * hourMS
	}
	hour := now - now%hourMS + hourMS
	p.to = min(to, now-now%p.stepMS+p.stepMS)
	p.prevTo = min(min(to, hour)-(from-prevFrom), from)
	return p
}

// dashPeriods returns the periods to choose from. Days, weeks and months are those of UTC; weeks start on Monday.
func dashPeriods(now int64) []dashPeriod {
	hour, day := now-now%hourMS+hourMS, now-now%dayMS
	date := time.UnixMilli(now).UTC()
	month := func(offset int) int64 {
		return time.Date(date.Year(), date.Month()+time.Month(offset), 1, 0, 0, 0, 0, time.UTC).UnixMilli()
	}
	week := day - int64(date.Weekday()+6)%7*dayMS
	return []dashPeriod{
		newPeriod("24h", "24 hours", now, hour-dayMS, hour, hour-2*dayMS),
		newPeriod("7d", "7 days", now, day-6*dayMS, day+dayMS, day-13*dayMS),
		newPeriod("30d", "30 days", now, day-29*dayMS, day+dayMS, day-59*dayMS),
		newPeriod("90d", "90 days", now, day-89*dayMS, day+dayMS, day-179*dayMS),
		newPeriod("today", "Today", now, day, day+dayMS, day-dayMS),
		newPeriod("yesterday", "Yesterday", now, day-dayMS, day, day-2*dayMS),
		newPeriod("this-week", "This week", now, week, week+7*dayMS, week-7*dayMS),
		newPeriod("last-week", "Last week", now, week-7*dayMS, week, week-14*dayMS),
		newPeriod("this-month", "This month", now, month(0), month(1), month(-1)),
		newPeriod("last-month", "Last month", now, month(-1), month(0), month(-2)),
	}
}

// periodOptions returns the choices of a form.
func periodOptions(now int64) (list []option) {
	for _, p := range dashPeriods(now) {
		list = append(list, option{p.name, p.title})
	}
	return list
}

const (
	commonPeriods = 5 // of dashPeriods, which forms show first
	maxRangeDays  = 366
)

// parsePeriod returns the period with a name or, if a day is given, the range of days, whose last is included. Without
// one of its days, a range begins a week before its end, or ends today.
func parsePeriod(now int64, name, from, to string) (dashPeriod, error) {
	if from == "" && to == "" {
		names := []string{}
		for _, p := range dashPeriods(now) {
			if p.name == name {
				return p, nil
			}
			names = append(names, p.name)
		}
		return dashPeriod{}, checkChoice("period", name, names...)
	}
	last := time.UnixMilli(now).UTC().Truncate(24 * time.Hour)
	first, err := last, error(nil)
	if to != "" {
		last, err = time.Parse(time.DateOnly, to)
	}
	first = last.AddDate(0, 0, -6)
	if from != "" && err == nil {
		first, err = time.Parse(time.DateOnly, from)
	}
	if err != nil {
		return dashPeriod{}, badRequest("invalid_value", "from", "From and To must be days such as 2026-01-31.")
	}
	begin, end := first.UnixMilli(), last.UnixMilli()+dayMS
	switch {
	case end <= begin:
		return dashPeriod{}, badRequest("invalid_value", "from", "From must not be after To.")
	case end-begin > maxRangeDays*dayMS:
		return dashPeriod{}, badRequest("invalid_value", "from", "A range has at most 366 days.")
	case begin > now || first.Year() < 2000:
		return dashPeriod{}, badRequest("invalid_value", "from", "From must be in the past, after the year 2000.")
	}
	p := newPeriod("range", "Range", now, begin, end, begin-(end-begin))
	p.fromDay, p.toDay = first.Format(time.DateOnly), last.Format(time.DateOnly)
	return p, nil
}

func (p *dashPeriod) steps() int         { return int((p.to - p.from) / p.stepMS) }
func (p *dashPeriod) index(at int64) int { return int((at - p.from) / p.stepMS) }

// hasWholeDays reports whether sums of days are enough: the period begins with a day.
func (p *dashPeriod) hasWholeDays() bool { return p.from%dayMS == 0 }

// addTo adds the period to the parameters of an address.
func (p *dashPeriod) addTo(values url.Values) url.Values {
	if p.fromDay == "" {
		values.Set("period", p.name)
	} else {
		values.Set("from", p.fromDay)
		values.Set("to", p.toDay)
	}
	for name, list := range values {
		if list[0] == "" {
			delete(values, name)
		}
	}
	return values
}

// A nearLimit is a limit of a day or longer that is mostly used up.
type nearLimit struct {
	token, name, project, projectID string // token and name are "" for a project's limit
	limit                           string // as limit.String describes it
	fraction                        float64
}

// nearLimits returns the limits that are used up to the given fraction or more. It checks at most maxEach
// projects and maxEach tokens, to bound the cost of a page.
func (g *registry) nearLimits(now int64, fraction float64, maxEach int) []nearLimit {
	g.mu.RLock()
	var projects []*liveProject
	for _, p := range g.projects {
		if projects = append(projects, p); len(projects) == maxEach {
			break
		}
	}
	var tokens []*liveToken
	for _, t := range g.byID {
		if tokens = append(tokens, t); len(tokens) == maxEach {
			break
		}
	}
	g.mu.RUnlock()
	var out []nearLimit
	for _, p := range projects {
		st := p.state.Load()
		owner := nearLimit{project: st.name, projectID: st.id}
		out = append(out, p.limiter.nearLimits(&p.limiter.project, now, fraction, owner)...)
	}
	for _, t := range tokens {
		st, p := t.state.Load(), t.project.state.Load()
		owner := nearLimit{token: st.id, name: st.name, project: p.name, projectID: p.id}
		out = append(out, t.project.limiter.nearLimits(&t.limits, now, fraction, owner)...)
	}
	return out
}

// sortNearLimits sorts limits by fraction, the highest first.
func sortNearLimits(limits []nearLimit) {
	slices.SortFunc(limits, func(a, b nearLimit) int {
		return cmp.Or(cmp.Compare(b.fraction, a.fraction), cmp.Compare(a.project, b.project),
			cmp.Compare(a.name, b.name), cmp.Compare(a.limit, b.limit))
	})
}

// nearLimits returns the limits of a scope that are used up to the fraction or more, each with owner's names.
func (l *limiter) nearLimits(s *limitScope, now int64, fraction float64, owner nearLimit) []nearLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leases != nil {
		now = l.leases.now()
	}
	return filterNearLimits(s.counters, now, fraction, owner)
}

func filterNearLimits(counters []*limitCounter, now int64, fraction float64, owner nearLimit) (out []nearLimit) {
	for _, c := range counters {
		if !c.limit.isQuota() || c.limit.monitorOnly || c.limit.max == 0 || c.group != nil {
			continue
		}
		c.advance(now)
		near := owner
		if near.fraction = float64(c.unscaledUse()) / float64(c.limit.max); near.fraction >= fraction {
			near.limit = c.limit.String()
			out = append(out, near)
		}
	}
	return out
}

// A durationPart is one part of a duration, and its place in a bar that is 1000 wide.
type durationPart struct {
	Name, Class string
	us          int64
	Text        string
	X, Width    coordinate
}

// newDurationBar lays the parts out one after the other, without those that took no time.
func newDurationBar(parts ...durationPart) (bar []durationPart) {
	total, x := 0.0, 0.0
	for _, p := range parts {
		total += float64(max(0, p.us))
	}
	for _, p := range parts {
		if p.us <= 0 {
			continue
		}
		width := 1000 * float64(p.us) / total
		p.Text, p.X, p.Width = unitMillis.format(float64(p.us)/1000), coordinate(x), coordinate(width)
		bar = append(bar, p)
		x += width
	}
	return bar
}
