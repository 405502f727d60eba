// This room is signing in to /admin and out again, and who a request's session
// belongs to. A session is a random id in a cookie; the database has its hash.
// It ends after sessionIdleTimeout without use, after maxSessionAge in any case, with
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
	sessionIdleTimeout   = 30 * time.Minute
	maxSessionAge        = 8 * time.Hour
	sessionTouchInterval = time.Minute // at most so often is a session's use written down
	sessionIDLen         = 43          // base62: 256 bits
)

// sessionCookieName is the name of the cookie: browsers hold one with __Host- to TLS,
// to this host and to all of its paths. Over plain HTTP they would refuse it.
func sessionCookieName(secure bool) string {
	if secure {
		return "__Host-llm-proxy"
	}
	return "llm-proxy"
}

// sessionCookie returns the cookie for a session's id; "" takes it away.
func sessionCookie(secure bool, id string) *http.Cookie {
	c := &http.Cookie{Name: sessionCookieName(secure), Value: id, Path: "/", Secure: secure, HttpOnly: true, SameSite: http.SameSiteStrictMode}
	if !secure {
		c.Path = "/admin"
	}
	if id == "" {
		c.MaxAge = -1
	}
	return c
}

// sessionID returns the session id that a request has, or "".
func (r *pageRequest) sessionID() string {
	cookies := r.http.CookiesNamed(sessionCookieName(r.secure))
	if len(cookies) != 1 || len(cookies[0].Value) != sessionIDLen { // two: one of them is not ours
		return ""
	}
	return cookies[0].Value
}

// loadSession fills in who is signed in. Without a session that holds, it leaves that
// empty.
func (ui *adminUI) loadSession(r *pageRequest) error {
	id := r.sessionID()
	if id == "" {
		return nil
	}
	now := r.now.UnixMilli()
	row, err := ui.store.sessionByHash(r.ctx, sha256.Sum256([]byte(id)), now)
	if errors.Is(err, errNotFound) {
		return nil
	}
	if err != nil {
		return errStoreUnavailable(err)
	}
	if now >= row.createdAt+maxSessionAge.Milliseconds() || now >= row.seenAt+sessionIdleTimeout.Milliseconds() {
		return nil
	}
	switch {
	case row.key == actorEnvironment:
		proof := ui.managementTokenProof(id)
		if proof == nil || subtle.ConstantTimeCompare(proof, row.proof) != 1 {
			return nil // MANAGEMENT_TOKEN is another one now
		}
		r.actor = environmentActor()
	case row.keyValid:
		r.actor = actor{row.key, row.name, role(row.role)}
	default:
		return nil
	}
	r.session = &row
	// A page that refreshes itself does not keep a session alive: nobody may be
	// sitting there.
	if now >= row.seenAt+sessionTouchInterval.Milliseconds() && r.http.Header.Get("X-Auto-Refresh") == "" {
		if err := ui.store.touchSession(r.ctx, row.hash, now); err != nil {
			return errStoreUnavailable(err)
		}
	}
	return nil
}

// managementTokenProof binds a session to MANAGEMENT_TOKEN as it is now. Without the
// session's id, which is not stored, it says nothing about the token.
func (ui *adminUI) managementTokenProof(id string) []byte {
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

func (ui *adminUI) signInPage(r *pageRequest) (*pageResponse, error) {
	next := localPath(r.query.Get("next"))
	if r.session != nil {
		return &pageResponse{redirect: next}, nil
	}
	return ui.signInForm(r, next, "", 0), nil
}

func (ui *adminUI) signInForm(r *pageRequest, next, problem string, status int) *pageResponse {
	return &pageResponse{template: "sign-in", title: "Sign in", status: status,
		data: signInView{next, problem, !r.secure && !isLoopbackHost(r.http.Host)}}
}

// signIn begins a session. Whatever session there was before is ended: its id
// may have been planted.
func (ui *adminUI) signIn(r *pageRequest) (*pageResponse, error) {
	next := localPath(r.form.Get("next"))
	who, err := ui.auth.verifyKey(r.ctx, r.origin, r.http.Pattern, strings.TrimSpace(r.form.Get("key")), r.now)
	if e, ok := errors.AsType[*apiError](err); ok && e.status < 500 {
		p := ui.signInForm(r, next, "This is no valid management key. Keys begin with llmpm_; an expired or revoked one does not work.", e.status)
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
	row := &sessionRow{hash: hash[:], key: who.id, proof: []byte{}, address: r.origin.address,
		createdAt: r.now.UnixMilli(), seenAt: r.now.UnixMilli()}
	if who.id == actorEnvironment {
		row.proof = ui.managementTokenProof(id)
	}
	var before []byte
	if old := r.sessionID(); old != "" {
		sum := sha256.Sum256([]byte(old))
		before = sum[:]
	}
	r.origin.actorID, r.origin.role = who.id, who.role
	if err := ui.store.addSession(r.ctx, r.origin, row, r.now.Add(-maxSessionAge).UnixMilli(), before); err != nil {
		return nil, err
	}
	return &pageResponse{redirect: next, cookie: sessionCookie(r.secure, id)}, nil
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

func (ui *adminUI) signOut(r *pageRequest) (*pageResponse, error) {
	if err := ui.store.endSession(r.ctx, r.origin, r.session.hash); err != nil {
		return nil, err
	}
	p := redirectTo("/admin/sign-in", "signed-out")
	p.cookie = sessionCookie(r.secure, "")
	return p, nil
}

func (ui *adminUI) signOutEverywhere(r *pageRequest) (*pageResponse, error) {
	if err := ui.store.endKeySessions(r.ctx, r.origin, r.actor.id); err != nil {
		return nil, err
	}
	p := redirectTo("/admin/sign-in", "signed-out-everywhere")
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
	CreatedAt, SeenAt, EndsAt timestamp
	IsThis                    bool
}

func (ui *adminUI) accountPage(r *pageRequest) (*pageResponse, error) {
	rows, err := ui.store.sessionsByKey(r.ctx, r.actor.id, r.now.UnixMilli(), r.now.Add(-sessionIdleTimeout).UnixMilli())
	if err != nil {
		return nil, err
	}
	v := accountView{ID: r.actor.id, Name: r.actor.name, Role: r.actor.role,
		Idle: "30 minutes", Whole: "8 hours"}
	for i := range rows {
		v.Sessions = append(v.Sessions, sessionView{Address: rows[i].address, CreatedAt: timestamp(rows[i].createdAt), SeenAt: timestamp(rows[i].seenAt),
			EndsAt: timestamp(rows[i].createdAt + maxSessionAge.Milliseconds()), IsThis: bytes.Equal(rows[i].hash, r.session.hash)})
	}
	return &pageResponse{template: "account", title: "Your access", data: v}, nil
}
