// This room is signing in to /admin and out again, and who a request's session
// belongs to. A session is a random id in a cookie; the database has its hash.
// It ends after idleSession without use, after longestSession in any case, with
// its key, and by signing out.
package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"
)

const (
	idleSession    = 30 * time.Minute
	longestSession = 8 * time.Hour
	touchEvery     = time.Minute // at most so often is a session's use written down
	sessionIDLen   = 43          // base62: 256 bits
)

// cookieName is the name of the cookie: browsers hold one with __Host- to TLS,
// to this host and to all of its paths. Over plain HTTP they would refuse it.
func cookieName(secure bool) string {
	if secure {
		return "__Host-llm-proxy"
	}
	return "llm-proxy"
}

// sessionCookie returns the cookie for a session's id; "" takes it away.
func sessionCookie(secure bool, id string) *http.Cookie {
	c := &http.Cookie{Name: cookieName(secure), Value: id, Path: "/", Secure: secure, HttpOnly: true, SameSite: http.SameSiteStrictMode}
	if !secure {
		c.Path = "/admin"
	}
	if id == "" {
		c.MaxAge = -1
	}
	return c
}

// presentedSession returns the session id that a request has, or "".
func (r *pageRequest) presentedSession() string {
	cookies := r.http.CookiesNamed(cookieName(r.secure))
	if len(cookies) != 1 || len(cookies[0].Value) != sessionIDLen { // two: one of them is not ours
		return ""
	}
	return cookies[0].Value
}

// resume fills in who is signed in. Without a session that holds, it leaves that
// empty.
func (ui *adminUI) resume(r *pageRequest) error {
	id := r.presentedSession()
	if id == "" {
		return nil
	}
	now := r.now.UnixMilli()
	row, err := ui.store.sessionByHash(r.ctx, sha256.Sum256([]byte(id)), now)
	if errors.Is(err, errNotFound) {
		return nil
	}
	if err != nil {
		return errUnavailable("store_unavailable", err)
	}
	if now >= row.createdAt+longestSession.Milliseconds() || now >= row.seenAt+idleSession.Milliseconds() {
		return nil
	}
	switch {
	case row.key == actorEnvironment:
		proof := ui.environmentProof(id)
		if proof == nil || subtle.ConstantTimeCompare(proof, row.proof) != 1 {
			return nil // MANAGEMENT_TOKEN is another one now
		}
		r.actor = environmentActor()
	case row.alive:
		r.actor = actor{row.key, row.name, role(row.role)}
	default:
		return nil
	}
	r.session = &row
	// A page that refreshes itself does not keep a session alive: nobody may be
	// sitting there.
	if now >= row.seenAt+touchEvery.Milliseconds() && r.http.Header.Get("X-Auto-Refresh") == "" {
		if err := ui.store.touchSession(r.ctx, row.hash, now); err != nil {
			return errUnavailable("store_unavailable", err)
		}
	}
	return nil
}

// environmentProof binds a session to MANAGEMENT_TOKEN as it is now. Without the
// session's id, which is not stored, it says nothing about the token.
func (ui *adminUI) environmentProof(id string) []byte {
	if ui.cfg.managementToken == nil {
		return nil
	}
	sum := sha256.Sum256([]byte("llm-proxy session v1|" + id + "|" + ui.cfg.managementToken()))
	return sum[:]
}

// A signInView is the page for signing in.
type signInView struct {
	Next, Problem string
	Open          bool // the connection is not encrypted, and not within this machine
}

func (ui *adminUI) signInPage(r *pageRequest) (*page, error) {
	next := localPath(r.query.Get("next"))
	if r.session != nil {
		return &page{to: next}, nil
	}
	return ui.signInAgain(r, next, "", 0), nil
}

func (ui *adminUI) signInAgain(r *pageRequest, next, problem string, status int) *page {
	return &page{template: "sign-in", title: "Sign in", status: status,
		data: signInView{next, problem, !r.secure && !isLoopbackHost(r.http.Host)}}
}

// signIn begins a session. Whatever session there was before is ended: its id
// may have been planted.
func (ui *adminUI) signIn(r *pageRequest) (*page, error) {
	next := localPath(r.form.Get("next"))
	who, err := ui.api.present(r.ctx, r.by, r.http.Pattern, strings.TrimSpace(r.form.Get("key")), r.now)
	if e, ok := errors.AsType[*apiError](err); ok && e.status < 500 {
		p := ui.signInAgain(r, next, "This is no valid management key. Keys begin with llmpm_; an expired or revoked one does not work.", e.status)
		if e.retryAfter > 0 {
			p.data = signInView{Next: next, Problem: fmt.Sprintf("Too many wrong keys came from your address. Wait %d seconds, then try again.",
				int(e.retryAfter/time.Second)+1)}
		}
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	id := randomBase62(sessionIDLen)
	hash := sha256.Sum256([]byte(id))
	row := &sessionRow{hash: hash[:], key: who.id, proof: []byte{}, address: r.by.address,
		createdAt: r.now.UnixMilli(), seenAt: r.now.UnixMilli()}
	if who.id == actorEnvironment {
		row.proof = ui.environmentProof(id)
	}
	var before []byte
	if old := r.presentedSession(); old != "" {
		sum := sha256.Sum256([]byte(old))
		before = sum[:]
	}
	r.by.actor, r.by.role = who.id, who.role
	if err := ui.store.addSession(r.ctx, r.by, row, r.now.Add(-longestSession).UnixMilli(), before); err != nil {
		return nil, err
	}
	return &page{to: next, cookie: sessionCookie(r.secure, id)}, nil
}

// localPath returns a path of these pages to go to, whatever text a link to the
// sign-in page had.
func localPath(next string) string {
	const home = "/admin/"
	u, err := url.Parse(next)
	if err != nil || u.Scheme != "" || u.Host != "" || u.User != nil || u.Opaque != "" || !strings.HasPrefix(u.Path, home) ||
		path.Clean(u.Path) != strings.TrimSuffix(u.Path, "/") || strings.ContainsFunc(next, func(c rune) bool { return c <= ' ' || c > '~' || c == '\\' }) ||
		strings.HasPrefix(u.Path, "/admin/sign-") {
		return home
	}
	return (&url.URL{Path: u.Path, RawQuery: u.RawQuery}).String()
}

func (ui *adminUI) signOut(r *pageRequest) (*page, error) {
	if err := ui.store.endSession(r.ctx, r.by, r.session.hash); err != nil {
		return nil, err
	}
	p := goTo("/admin/sign-in", "signed-out")
	p.cookie = sessionCookie(r.secure, "")
	return p, nil
}

func (ui *adminUI) signOutEverywhere(r *pageRequest) (*page, error) {
	if err := ui.store.endSessions(r.ctx, r.by, r.actor.id); err != nil {
		return nil, err
	}
	p := goTo("/admin/sign-in", "signed-out-everywhere")
	p.cookie = sessionCookie(r.secure, "")
	return p, nil
}

// An accountView is the page about who is signed in.
type accountView struct {
	ID, Name    string
	Role        role
	Sessions    []sessionView
	Idle, Whole string
}

type sessionView struct {
	Address                   string
	CreatedAt, SeenAt, EndsAt stamp
	IsThis                    bool
}

func (ui *adminUI) accountPage(r *pageRequest) (*page, error) {
	rows, err := ui.store.sessionsOf(r.ctx, r.actor.id, r.now.UnixMilli(), r.now.Add(-idleSession).UnixMilli())
	if err != nil {
		return nil, err
	}
	v := accountView{ID: r.actor.id, Name: r.actor.name, Role: r.actor.role,
		Idle: "30 minutes", Whole: "8 hours"}
	for i := range rows {
		v.Sessions = append(v.Sessions, sessionView{Address: rows[i].address, CreatedAt: stamp(rows[i].createdAt), SeenAt: stamp(rows[i].seenAt),
			EndsAt: stamp(rows[i].createdAt + longestSession.Milliseconds()), IsThis: bytes.Equal(rows[i].hash, r.session.hash)})
	}
	return &page{template: "account", title: "Your access", data: v}, nil
}
