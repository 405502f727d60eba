// This file has what the lists of /admin share, and the list of tokens: search, filters, the order of a column, pages
// in both directions, and what each token has used lately. All of it is in the address. It is thin over store_lists.go.
package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	defaultPageSize  = 50
	maxTokensScanned = 5000 // for one page
	// maxSorted is how many tokens or projects a page puts in an order that no index has.
	maxSorted = 1000
)

// pageSizes returns how many entries a page of a list may have.
func pageSizes() []int { return []int{25, 50, 100, 200} }

// A listView is what the pages of lists share. All fields are for templates.
type listView struct {
	Search     string
	Order      string   // of the address; "": the list's own
	Problem    string   // with the filters, in words
	Hint       string   // about the order
	Columns    []column // of the table
	Size       int
	Sizes      []option // the addresses of the list with other sizes
	Prev, Next string   // addresses of pages; "" if there is none
	Partial    bool     // more may match than was read for this page
	LaterPage  bool
	Total      *listTotal
}

// A column is the head of a column.
type column struct {
	Title, Class string
	URL          string // the list in the order of the column; "": it has none
	Sort         string // ascending, descending or "", as in aria-sort
}

// A listTotal is the last line of a list.
type listTotal struct {
	Label string
	Calls int64
	Cost  dollars
}

// newListView reads what the address says about every list.
func (r *pageRequest) newListView() listView {
	v := listView{Search: strings.TrimSpace(r.query.Get("search")), Order: r.query.Get("order"), Size: defaultPageSize,
		LaterPage: r.query.Get("after") != "" || r.query.Get("before") != ""}
	if text := r.query.Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || !slices.Contains(pageSizes(), n) {
			v.Problem = "A page has 25, 50, 100 or 200 entries."
		} else {
			v.Size = n
		}
	}
	for _, n := range pageSizes() {
		v.Sizes = append(v.Sizes, option{r.listURL("limit", strconv.Itoa(n)), strconv.Itoa(n)})
	}
	if r.query.Get("after") != "" && r.query.Get("before") != "" {
		v.Problem = "This address is not a page of the list."
	}
	return v
}

// listURL returns the address of the list from its start with the pairs of names and values changed. An empty value
// removes a parameter.
func (r *pageRequest) listURL(pairs ...string) string {
	q := maps.Clone(r.query)
	q.Del("after")
	q.Del("before")
	for i := 0; i < len(pairs); i += 2 {
		if q.Del(pairs[i]); pairs[i+1] != "" {
			q.Set(pairs[i], pairs[i+1])
		}
	}
	if len(q) == 0 {
		return r.http.URL.Path
	}
	return r.http.URL.Path + "?" + q.Encode()
}

// problemOf returns an error about a filter in words, and any other error.
func problemOf(err error) (string, error) {
	if e, ok := errors.AsType[*apiError](err); ok && e.status == http.StatusBadRequest {
		return e.msg, nil
	}
	return "", err
}

// A sortColumn is a column that can be chosen as the order: its title, and the order of the first click. The second
// reverses it.
type sortColumn struct{ title, order, class string }

// addColumns adds the heads of columns. reverse returns an order's reverse; shown is the order of this page.
func (v *listView) addColumns(r *pageRequest, shown string, columns ...sortColumn) {
	for _, c := range columns {
		head := column{Title: c.title, Class: c.class}
		if c.order != "" {
			next := c.order
			if shown == c.order {
				next = reverseOrder(c.order)
			}
			if shown == c.order || shown == reverseOrder(c.order) {
				head.Sort = "ascending"
				if strings.HasPrefix(shown, "-") || shown == tokensNewest {
					head.Sort = "descending"
				}
			}
			head.URL = r.listURL("order", next)
		}
		v.Columns = append(v.Columns, head)
	}
}

// reverseOrder returns the reverse of an order in an address.
func reverseOrder(order string) string {
	switch order {
	case tokensNewest:
		return tokensOldest
	case tokensOldest:
		return tokensNewest
	}
	if rest, ok := strings.CutPrefix(order, "-"); ok {
		return rest
	}
	return "-" + order
}

// A sortKey is the place of an entry in a list that is sorted here.
type sortKey struct {
	number int64
	text   string
	seq    int64
}

func (k sortKey) compare(o sortKey) int {
	return cmp.Or(cmp.Compare(k.number, o.number), cmp.Compare(k.text, o.text), cmp.Compare(k.seq, o.seq))
}

// cursor returns the key as a position in the address.
func (k sortKey) cursor() string {
	return formatCursor(k.seq, strconv.FormatInt(k.number, 36)+","+k.text)
}

func parseSortKey(cursor string) (k sortKey, err error) {
	var rest string
	if k.seq, rest, err = parseCursor(cursor); err != nil {
		return k, err
	}
	number, text, _ := strings.Cut(rest, ",")
	k.text = text
	k.number, err = strconv.ParseInt(number, 36, 64)
	return k, err
}

// sortedPage sorts all entries, and returns those of the page that the address asks for. It sets the links to the
// pages beside it.
func sortedPage[T any](r *pageRequest, v *listView, all []T, order string, keyOf func(*T) sortKey) []T {
	compare := func(a, b sortKey) int { return a.compare(b) }
	if strings.HasPrefix(order, "-") || order == tokensNewest {
		compare = func(a, b sortKey) int { return b.compare(a) }
	}
	slices.SortFunc(all, func(a, b T) int { return compare(keyOf(&a), keyOf(&b)) })
	start, end := 0, min(v.Size, len(all))
	if cursor := cmp.Or(r.query.Get("after"), r.query.Get("before")); cursor != "" {
		key, err := parseSortKey(cursor)
		if err != nil {
			v.Problem = "This address is not a page of the list."
			return nil
		}
		at, found := slices.BinarySearchFunc(all, key, func(e T, k sortKey) int { return compare(keyOf(&e), k) })
		switch {
		case r.query.Get("before") != "":
			start, end = max(0, at-v.Size), at
		case found:
			start, end = at+1, min(at+1+v.Size, len(all))
		default:
			start, end = at, min(at+v.Size, len(all))
		}
	}
	page := all[start:end]
	if start > 0 && len(page) > 0 {
		v.Prev = r.listURL("before", keyOf(&page[0]).cursor())
	}
	if end < len(all) && len(page) > 0 {
		v.Next = r.listURL("after", keyOf(&page[len(page)-1]).cursor())
	}
	return page
}

// The pageEnds of a page that was read from an index are its first and last cursors, "" for an empty page, and whether
// there is more in the direction of reading, after the cursor beyond.
type pageEnds struct {
	first, last, beyond string
	more                bool
}

// setPages sets the links to the pages beside the one that the address asks for. There is always one where the reader
// comes from.
func (v *listView) setPages(r *pageRequest, e pageEnds) {
	if r.query.Get("before") != "" {
		if e.more {
			v.Prev = r.listURL("before", e.beyond)
		}
		if e.last != "" {
			v.Next = r.listURL("after", e.last)
		}
		return
	}
	if e.more {
		v.Next = r.listURL("after", e.beyond)
	}
	if e.first != "" && r.query.Get("after") != "" {
		v.Prev = r.listURL("before", e.first)
	}
}

// A useView is what a token or project has used on the recent days.
type useView struct {
	Calls int64
	Cost  dollars
	Spark *sparkline // nil: it was not used
}

func newUseView(u *recentUse) (v useView) {
	if u == nil {
		return v
	}
	v.Calls, v.Cost = u.calls, dollars(u.cost)
	if u.calls > 0 {
		v.Spark = newSparkline(u)
	}
	return v
}

// A sparkline is a small chart of the calls of each recent day.
type sparkline struct {
	Path  string // of an SVG of one unit per day and sparkHeight
	Label string
}

const sparkHeight = 20

func newSparkline(u *recentUse) *sparkline {
	highest := int64(1)
	for _, d := range u.days {
		highest = max(highest, d.calls)
	}
	var path strings.Builder
	for i, d := range u.days {
		if d.calls > 0 {
			height := formatTwoDecimals(max(1, float64(d.calls)/float64(highest)*sparkHeight))
			fmt.Fprintf(&path, "M%d %dv-%sh.8v%sz", i, sparkHeight, height, height)
		}
	}
	return &sparkline{Path: path.String(),
		Label: "Calls on each of the last 30 days, at most " + groupDigits(highest)}
}

// A tokensView is the data of templates/tokens.html.
type tokensView struct {
	listView
	Tokens   []tokenLine
	Project  string // the filters
	Name     string
	State    string
	Projects []option
	States   []option
	NoTokens bool // there are none at all
}

// A tokenLine is a token in the list.
type tokenLine struct {
	tokenView
	seq         int64
	row         *tokenRow
	ProjectName string
	State       stateView
	Use         useView
}

func tokenStates() []option {
	return options("", "All", "active", "Active", "expiring", "Expiring within 7 days", "expired", "Expired",
		"revoked", "Revoked", "unused", "Never used")
}

// tokenOrders returns the orders of the list: those of an index, and those of at most maxSorted tokens.
func tokenOrders() []option {
	return options("", "Newest first", tokensOldest, "Oldest first", tokensByName, "Name",
		"-"+tokensByName, "Name, Z to A", tokensByEnd, "Expiry, soonest first (without revoked)",
		"-"+tokensByEnd, "Expiry, latest first (without revoked)",
		"used", "Last used, longest ago first", "-used", "Last used, latest first", "calls", "Fewest calls",
		"-calls", "Most calls", "cost", "Lowest cost", "-cost", "Highest cost")
}

// isSortedHere reports whether no index has an order of tokens.
func isSortedHere(order string) bool {
	return slices.Contains([]string{"used", "calls", "cost"}, strings.TrimPrefix(order, "-"))
}

func (ui *adminUI) tokensPage(r *pageRequest) (*pageResponse, error) {
	r.query.Set("search", tokenSearch(r.query.Get("search")))
	v := &tokensView{listView: r.newListView(), Project: r.query.Get("project_id"), States: tokenStates(),
		Name: strings.TrimSpace(r.query.Get("name")), State: r.query.Get("state")}
	for _, id := range []string{v.Search, v.Name} {
		if strings.HasPrefix(id, "tok_") {
			if t, err := ui.store.tokenByID(r.ctx, id); err == nil {
				return &pageResponse{redirect: "/admin/tokens/" + t.id}, nil
			}
		}
	}
	var err error
	if v.Projects, err = ui.projectOptions(r, v.Project); err != nil {
		return nil, err
	}
	q, err := v.listQuery(r)
	if v.Problem == "" {
		v.Problem, err = problemOf(err)
	}
	if err == nil && v.Project != "" {
		if _, err = ui.store.projectByID(r.ctx, v.Project); errors.Is(err, errNotFound) {
			v.Problem, err = "There is no such project.", nil
		}
	}
	page := showPage("tokens", "Tokens", v)
	if err == nil && v.Problem == "" {
		err = ui.fillTokens(r, v, q)
	}
	if v.Problem != "" {
		page.status, v.Tokens = http.StatusBadRequest, nil
	}
	return page, err
}

// tokenSearch returns what a search looks for: of a token's value, its id. The page does not repeat the rest of it.
func tokenSearch(text string) string {
	if public, ok := strings.CutPrefix(strings.TrimSpace(text), tokenPrefix); ok {
		return "tok_" + public[:min(len(public), publicLen)]
	}
	return text
}

// sortsHere reports whether the page reads all matching tokens and sorts them.
func (v *tokensView) sortsHere() bool {
	return isSortedHere(v.Order) || v.Search != "" && v.Order != "" && v.Order != tokensOldest
}

// listQuery chooses the index that the list follows. Filters override the order where no index has
// both.
func (v *tokensView) listQuery(r *pageRequest) (q tokenListQuery, err error) {
	for _, c := range []struct {
		name, value string
		allowed     []option
	}{{"state", v.State, v.States}, {"order", v.Order, tokenOrders()}} {
		if !slices.ContainsFunc(c.allowed, func(o option) bool { return o.Value == c.value }) &&
			!(c.name == "order" && c.value == tokensNewest) {
			return q, badRequest("invalid_value", c.name, "There is no such "+c.name+".")
		}
	}
	if len(v.Name) > 100 {
		return q, badRequest("invalid_value", "name", "A name has at most 100 bytes.")
	}
	if v.Order == tokensNewest {
		v.Order = ""
	}
	base := v.Order
	if v.sortsHere() {
		base = ""
	}
	q = tokenListQuery{order: cmp.Or(base, tokensNewest), project: v.Project, prefix: v.Name, to: neverExpires,
		limit: maxTokensScanned}
	if q.search, err = parseSearchTerm(v.Search); err != nil {
		return q, err
	}
	isByName := strings.TrimPrefix(q.order, "-") == tokensByName
	switch {
	case !q.search.isEmpty():
	case v.Name != "" && !isByName:
		q.order = tokensByName
	case v.Name == "" && !isByName && q.order != tokensOldest:
		v.chooseStateOrder(&q, r.now.UnixMilli())
	}
	if !v.sortsHere() && q.order != v.Order {
		v.Order = ""
		if slices.Contains([]string{tokensByEnd, tokensByName}, q.order) {
			v.Order = q.order
		}
	}
	return q, nil
}

// chooseStateOrder chooses the index for a state.
func (v *tokensView) chooseStateOrder(q *tokenListQuery, now int64) {
	isByEnd := strings.TrimPrefix(q.order, "-") == tokensByEnd
	order := tokensByEnd
	if isByEnd {
		order = q.order
	}
	switch v.State {
	case "active":
		q.order, q.from = order, now
	case "expiring":
		q.order, q.from, q.to = order, now, now+expiringSoon.Milliseconds()
	case "expired":
		q.order, q.to = order, now
	case "revoked":
		q.order = tokensNewest // revoked tokens no longer expire
		if v.Project == "" {
			q.order = tokensRevoked
		}
	case "unused":
		if v.Project == "" && !isByEnd {
			q.order = tokensUnused
		}
	}
}

// parseAfter continues the list after a cursor, and reports whether the cursor is valid.
func (q *tokenListQuery) parseAfter(cursor string) bool {
	seq, key, err := parseCursor(cursor)
	q.afterSeq = seq
	switch strings.TrimPrefix(q.order, "-") {
	case tokensByName:
		q.afterName = key
	case tokensByEnd, tokensRevoked:
		if err == nil {
			q.afterTime, err = strconv.ParseInt(key, 36, 64)
		}
	}
	return err == nil && q.afterSeq >= 1 && q.afterTime >= 0
}

// cursorAfter returns the cursor of the list after a token.
func (q *tokenListQuery) cursorAfter(t *tokenRow) string {
	switch strings.TrimPrefix(q.order, "-") {
	case tokensByName:
		return formatCursor(t.seq, t.name)
	case tokensByEnd:
		return formatCursor(t.seq, strconv.FormatInt(t.endsAt, 36))
	case tokensRevoked:
		return formatCursor(t.seq, strconv.FormatInt(deref(t.revokedAt), 36))
	}
	return formatCursor(t.seq, "")
}

// matches filters by state what the index did not.
func (v *tokensView) matches(t *tokenLine, now time.Time) bool {
	switch v.State {
	case "active":
		return t.IsActive
	case "expiring":
		return t.IsActive && expiresSoon(t.ExpiresAt, now)
	case "expired":
		return t.RevokedAt == nil && !t.IsActive
	case "revoked":
		return t.RevokedAt != nil
	case "unused":
		return t.LastUsedAt == nil
	}
	return true
}

// readTokens reads up to limit tokens that match. more and cursor say where the list goes on.
func (ui *adminUI) readTokens(r *pageRequest, v *tokensView, q tokenListQuery, limit int,
) (lines []tokenLine, more bool, cursor string, err error) {
	more, scanned, err := ui.store.walkTokens(r.ctx, q, func(t *tokenRow) bool {
		if len(lines) == limit {
			return false
		}
		cursor = q.cursorAfter(t)
		line := tokenLine{tokenView: ui.ops.newTokenView(t, r.now), seq: t.seq, row: t}
		line.State = newTokenStateView(&line.tokenView, r.now)
		if v.matches(&line, r.now) {
			lines = append(lines, line)
		}
		return true
	})
	if scanned != 0 {
		cursor = formatCursor(scanned, "")
	}
	return lines, more, cursor, err
}

// fillTokens reads the page of the list that the address asks for.
func (ui *adminUI) fillTokens(r *pageRequest, v *tokensView, q tokenListQuery) error {
	shown := cmp.Or(v.Order, tokensNewest)
	if strings.TrimPrefix(cmp.Or(v.Order, q.order), "-") == tokensByEnd && (v.State == "" || v.State == "unused") {
		v.Hint = "Revoked tokens are left out: they no longer expire."
	}
	if v.Order == "" && (q.order == tokensRevoked || q.order == tokensUnused) {
		shown = ""
	}
	isSorted, err := false, error(nil)
	if v.sortsHere() {
		if isSorted, err = ui.sortTokens(r, v, q); err == nil && !isSorted {
			v.Hint = "Too many tokens to sort by this column. Search, or choose a project or a state."
			v.Order, shown = "", tokensNewest
		}
	}
	if err == nil && !isSorted {
		err = ui.fillIndexedTokens(r, v, q)
	}
	if err != nil || v.Problem != "" {
		return err
	}
	v.addColumns(r, shown, sortColumn{"Token", tokensByName, ""}, sortColumn{"Project", "", ""},
		sortColumn{"State", "", ""}, sortColumn{"Expires", tokensByEnd, ""}, sortColumn{"Last used", "-used", ""},
		sortColumn{"Calls, 30 days", "-calls", "num"}, sortColumn{"Cost, 30 days", "-cost", "num"},
		sortColumn{"Created", tokensNewest, "extra"})
	v.NoTokens = len(v.Tokens) == 0 && v.Next == "" && !v.LaterPage && v.Project == "" && v.Name == "" &&
		v.State == "" && v.Search == ""
	return errors.Join(ui.totalTokens(r, v, isSorted), ui.nameProjects(r, v.Tokens))
}

// sortTokens sorts all matching tokens, unless they are too many.
func (ui *adminUI) sortTokens(r *pageRequest, v *tokensView, q tokenListQuery) (isSorted bool, err error) {
	all, more, _, err := ui.readTokens(r, v, q, maxSorted)
	if err != nil || more {
		return false, err
	}
	order := strings.TrimPrefix(v.Order, "-")
	if order == tokensByEnd && v.State != "revoked" { // like the index by end
		all = slices.DeleteFunc(all, func(t tokenLine) bool { return t.RevokedAt != nil })
	}
	use, err := ui.addTokenUse(r, all)
	if err != nil {
		return false, err
	}
	page := sortedPage(r, &v.listView, all, v.Order, func(t *tokenLine) sortKey {
		key := sortKey{seq: t.seq}
		switch order {
		case tokensByName:
			key.text = strings.ToLower(t.Name)
		case tokensByEnd:
			key.number = t.row.endsAt
		case "used":
			key.number = deref(t.row.lastUsedAt)
		case "calls":
			key.number = t.Use.Calls
		case "cost":
			key.number = int64(t.Use.Cost)
		}
		return key
	})
	v.Tokens = page
	v.Total = &listTotal{Label: pluralize(int64(len(all)), "token", "tokens"), Calls: use.calls,
		Cost: dollars(use.cost)}
	return true, nil
}

// addTokenUse fills in what tokens have used on the recent days, and returns the sum.
func (ui *adminUI) addTokenUse(r *pageRequest, lines []tokenLine) (sum usageTotals, err error) {
	var seqs []int64
	for i := range lines {
		if at := lines[i].row.lastUsedAt; at != nil && *at >= recentFrom(r.now.UnixMilli()) {
			seqs = append(seqs, lines[i].seq)
		}
	}
	found, err := ui.store.recentTokenUse(r.ctx, seqs, r.now.UnixMilli())
	for i := range lines {
		u := found[lines[i].seq]
		lines[i].Use = newUseView(u)
		if u != nil {
			sum.add(u.usageTotals)
		}
	}
	return sum, err
}

// fillIndexedTokens reads a page in the order of an index.
func (ui *adminUI) fillIndexedTokens(r *pageRequest, v *tokensView, q tokenListQuery) error {
	before := r.query.Get("before")
	if before != "" {
		q = q.reversed()
	}
	cursor := cmp.Or(r.query.Get("after"), before)
	if cursor != "" && !q.parseAfter(cursor) {
		v.Problem = "This address is not a page of the list."
		return nil
	}
	lines, more, last, err := ui.readTokens(r, v, q, v.Size)
	if err != nil {
		return err
	}
	ends := pageEnds{more: more, beyond: last}
	if before != "" {
		slices.Reverse(lines)
	}
	if n := len(lines); n > 0 {
		ends.first, ends.last = q.cursorAfter(lines[0].row), q.cursorAfter(lines[n-1].row)
	}
	v.setPages(r, ends)
	v.Tokens, v.Partial = lines, more && len(lines) < v.Size
	_, err = ui.addTokenUse(r, lines)
	return err
}

// totalTokens sets the last line of the list: of all that match if they are on the page, or else of the project or of
// everything if there is no other filter.
func (ui *adminUI) totalTokens(r *pageRequest, v *tokensView, isSorted bool) error {
	switch isWhole := !v.LaterPage && v.Next == ""; {
	case isSorted || len(v.Tokens) == 0:
	case isWhole || v.Search != "" || v.Name != "" || v.State != "":
		total := &listTotal{Label: "This page"}
		if isWhole {
			total.Label = pluralize(int64(len(v.Tokens)), "token", "tokens")
		}
		for i := range v.Tokens {
			total.Calls = addSat(total.Calls, v.Tokens[i].Use.Calls)
			total.Cost = dollars(addSat(int64(total.Cost), int64(v.Tokens[i].Use.Cost)))
		}
		v.Total = total
	default:
		total, err := ui.recentTotal(r, v.Project)
		if err != nil {
			return err
		}
		if total.Label = "All tokens"; v.Project != "" {
			total.Label = "All tokens of the project"
		}
		v.Total = &total
	}
	return nil
}

// recentTotal returns what a project, or all ("") have used on the recent days.
func (ui *adminUI) recentTotal(r *pageRequest, project string) (listTotal, error) {
	from := recentFrom(r.now.UnixMilli())
	rows, err := ui.store.usage(r.ctx, usageQuery{interval: "total", totalsOnly: true, project: project, from: from,
		to: from + recentDays*dayMS, limit: math.MaxInt32})
	var sum usageTotals
	for i := range rows {
		sum.add(rows[i].totals())
	}
	return listTotal{Calls: sum.calls, Cost: dollars(sum.cost)}, err
}

// findFilterToken replaces the name of a token in the filters of calls by its ID. The beginning of a name is enough if
// no other has it. It returns what is wrong as text.
func (ui *adminUI) findFilterToken(r *pageRequest, f *requestFilter) (problem string, err error) {
	const most = 10
	if f.token == "" || strings.HasPrefix(f.token, "tok_") {
		return "", nil
	}
	rows, _, err := ui.store.listTokens(r.ctx, tokenListQuery{order: tokensByName, project: f.project, prefix: f.token,
		limit: most})
	if slices.ContainsFunc(rows, func(t tokenRow) bool { return t.name == f.token }) {
		rows = slices.DeleteFunc(rows, func(t tokenRow) bool { return t.name != f.token })
	}
	if err != nil || len(rows) == 1 {
		for _, t := range rows {
			f.token = t.id
		}
		return "", err
	}
	var found []string
	for _, t := range rows {
		found = append(found, t.name+" ("+t.id+")")
	}
	if len(rows) == most {
		found = append(found, "…")
	}
	if len(found) == 0 {
		return "No token has this ID, or a name that begins like this.", nil
	}
	return "Several tokens match. Enter the ID of one: " + strings.Join(found, ", "), nil
}
