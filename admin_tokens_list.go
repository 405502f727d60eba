// The page of /admin that lists tokens: filters, orders, and the way from page to
// page by where the last one ended, so that a million tokens are no slower than
// ten.
package main

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	tokensOnPage  = 50
	tokensSifted  = 5000 // so many at most are looked at for one page
	expiringSoon  = 7 * 24 * time.Hour
	shownProjects = 2000 // in the choice of projects
)

// A tokenLine is a token in a list.
type tokenLine struct {
	tokenView
	ProjectName string
	State       stateView
}

// A stateView is a word on how something is, and its colour.
type stateView struct{ Kind, Text string }

// stateOf says what a token is worth now.
func stateOf(t *tokenView, now time.Time) stateView {
	switch {
	case t.RevokedAt != nil:
		return stateView{"bad", "revoked"}
	case t.ExpiresAt != nil && int64(*t.ExpiresAt) <= now.UnixMilli():
		return stateView{"bad", "expired"}
	case !t.IsActive:
		return stateView{"bad", "idle too long"}
	case t.MaxRequests != nil && t.RequestCount >= *t.MaxRequests:
		return stateView{"warn", "used up"}
	case t.ExpiresAt != nil && int64(*t.ExpiresAt) <= now.Add(expiringSoon).UnixMilli():
		return stateView{"warn", "expires soon"}
	}
	return stateView{"good", "active"}
}

// A tokensView is the list of tokens.
type tokensView struct {
	Tokens               []tokenLine
	Project, Name        string // what the list is narrowed by
	State, Order         string
	Projects             []option
	States, Orders       []option
	Next                 string
	First, Sifted, Above bool // no token at all; not all were looked at; it is not the first page
	Problem              string
}

func tokenStates() []option {
	return []option{{"", "All"}, {"active", "Active"}, {"expiring", "Expiring within 7 days"}, {"expired", "Expired"}, {"revoked", "Revoked"}, {"unused", "Never used"}}
}

func tokenOrders() []option {
	return []option{{"", "Newest first"}, {"oldest", "Oldest first"}, {"name", "Name"}, {"ends", "Expiry, soonest first; no revoked ones"}}
}

func (s *server) tokensPage(r *pageRequest) (*page, error) {
	v := &tokensView{Project: r.query.Get("project_id"), Name: strings.TrimSpace(r.query.Get("name")), State: r.query.Get("state"), Order: r.query.Get("order"),
		States: tokenStates(), Orders: tokenOrders(), Above: r.query.Get("after") != ""}
	if strings.HasPrefix(v.Name, "tok_") {
		if t, err := s.store.tokenByID(r.ctx, v.Name); err == nil {
			return &page{to: "/admin/tokens/" + t.id}, nil
		}
	}
	p := &page{template: "tokens", title: "Tokens", data: v}
	projects, err := s.projectOptions(r, v.Project)
	if err != nil {
		return nil, err
	}
	v.Projects = append([]option{{"", "All"}}, projects...)
	w, err := v.walk(r)
	if err != nil {
		return nil, err
	}
	if v.Project != "" {
		if _, err := s.store.projectByID(r.ctx, v.Project); err != nil {
			return nil, err
		}
	}
	last, looked := "", 0
	more, err := s.store.walkTokens(r.ctx, w, func(t *tokenRow) bool {
		if len(v.Tokens) == tokensOnPage {
			return false
		}
		looked++
		last = w.cursor(t)
		line := tokenLine{tokenView: s.showToken(t, r.now)}
		line.State = stateOf(&line.tokenView, r.now)
		if v.matches(&line, r.now) {
			v.Tokens = append(v.Tokens, line)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	if more {
		v.Next = r.nextPage(last)
		v.Sifted = len(v.Tokens) < tokensOnPage
	}
	v.First = looked == 0 && !v.Above && v.Project == "" && v.Name == "" && v.State == ""
	return p, s.nameProjects(r, v.Tokens)
}

// walk works out along which index the list goes. An order that the filters do
// not allow gives way to theirs.
func (v *tokensView) walk(r *pageRequest) (tokenWalk, error) {
	for _, c := range []struct {
		name, value string
		known       []option
	}{{"state", v.State, v.States}, {"order", v.Order, v.Orders}} {
		if !slices.ContainsFunc(c.known, func(o option) bool { return o.Value == c.value }) {
			return tokenWalk{}, badRequest("invalid_value", c.name, "There is no such "+c.name+".")
		}
	}
	if len(v.Name) > 100 {
		return tokenWalk{}, badRequest("invalid_value", "name", "A name has 100 bytes at most.")
	}
	now := r.now.UnixMilli()
	w := tokenWalk{order: cmp.Or(v.Order, "newest"), project: v.Project, prefix: v.Name, to: neverEnds, limit: tokensSifted}
	if v.Name != "" {
		w.order = "name"
	}
	if w.order != "name" && v.Order != "oldest" {
		switch v.State {
		case "active":
			w.order, w.from = "ends", now
		case "expiring":
			w.order, w.from, w.to = "ends", now, now+expiringSoon.Milliseconds()
		case "expired":
			w.order, w.to = "ends", now
		case "revoked", "unused":
			if v.State == "revoked" {
				w.order, v.Order = "newest", "" // these expire no more
			}
			if v.Project == "" && v.Order == "" {
				w.order = v.State
			}
		}
	}
	if w.order == "ends" || w.order == "name" || w.order == "oldest" {
		v.Order = w.order
	}
	after := r.query.Get("after")
	if after == "" {
		return w, nil
	}
	var key string
	var err error
	if w.afterSeq, key, err = parseCursor(after); err == nil {
		switch w.order {
		case "name":
			w.afterName = key
		case "ends", "revoked":
			w.afterEnds, err = strconv.ParseInt(key, 36, 64)
		}
	}
	if err != nil || w.afterSeq < 1 || w.afterEnds < 0 {
		return w, badRequest("invalid_value", "after", "This is not the address of a page of the list.")
	}
	return w, nil
}

// cursor says where the list goes on after a token.
func (w *tokenWalk) cursor(t *tokenRow) string {
	switch w.order {
	case "name":
		return cursor(t.seq, t.name)
	case "ends":
		ends := int64(neverEnds)
		if t.expiresAt != nil {
			ends = *t.expiresAt
		}
		return cursor(t.seq, strconv.FormatInt(ends, 36))
	case "revoked":
		return cursor(t.seq, strconv.FormatInt(deref(t.revokedAt), 36))
	}
	return cursor(t.seq, "")
}

// matches sifts out what the index did not.
func (v *tokensView) matches(t *tokenLine, now time.Time) bool {
	switch v.State {
	case "active":
		return t.IsActive
	case "expiring":
		return t.IsActive && t.ExpiresAt != nil && int64(*t.ExpiresAt) <= now.Add(expiringSoon).UnixMilli()
	case "expired":
		return t.RevokedAt == nil && !t.IsActive
	case "revoked":
		return t.RevokedAt != nil
	case "unused":
		return t.LastUsedAt == nil
	}
	return true
}

// projectOptions is the choice of projects, by name. The one that is chosen is
// among them even where there are too many.
func (s *server) projectOptions(r *pageRequest, chosen string) ([]option, error) {
	rows, err := s.store.listProjects(r.ctx, 0, shownProjects, nil, "")
	if err != nil {
		return nil, err
	}
	out := make([]option, 0, len(rows))
	found := chosen == ""
	for i := range rows {
		out = append(out, option{rows[i].id, rows[i].name})
		found = found || rows[i].id == chosen
	}
	if !found {
		if p, err := s.store.projectByID(r.ctx, chosen); err == nil {
			out = append(out, option{p.id, p.name})
		}
	}
	slices.SortFunc(out, func(a, b option) int { return cmp.Compare(strings.ToLower(a.Label), strings.ToLower(b.Label)) })
	return out, nil
}

// nameProjects fills in the names of the projects of a page.
func (s *server) nameProjects(r *pageRequest, lines []tokenLine) error {
	names := map[string]string{}
	for i := range lines {
		id := lines[i].ProjectID
		if _, ok := names[id]; !ok {
			name, err := s.projectName(r, id)
			if err != nil {
				return err
			}
			names[id] = name
		}
		lines[i].ProjectName = names[id]
	}
	return nil
}
