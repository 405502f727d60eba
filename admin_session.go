// This file signs people in to /admin and out again, and finds the session of a request. A session is a
// random id in a cookie; the database has only its hash. It ends after sessionIdleTimeout without use,
// after maxSessionAge in any case, when its key ends, and when its owner signs out.
package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"
)

const (
	sessionIdleTimeout   = 30 * time.Minute
	maxSessionAge        = 8 * time.Hour
	sessionTouchInterval = time.Minute // the use of a session is stored at most this often
	sessionIDLen         = 43          // base62: 256 bits
)

// sessionCookieName returns the name of the cookie. Browsers bind a name with __Host- to TLS and to
// this exact host; over plain HTTP they would refuse it.
func sessionCookieName(secure bool) string {
	if secure {
		return "__Host-llm-proxy"
	}
	return "llm-proxy"
}

// sessionCookie returns the cookie with a session's id. An empty id removes it from the browser.
func sessionCookie(secure bool, id string) *http.Cookie {
	c := &http.Cookie{Name: sessionCookieName(secure), Value: id, Path: "/", Secure: secure, HttpOnly: true,
		SameSite: http.SameSiteStrictMode}
	if !secure {
		c.Path = "/admin"
	}
	if id == "" {
		c.MaxAge = -1
	}
	return c
}

// sessionID returns the session id of the request, or "".
func (r *pageRequest) sessionID() string {
	cookies := r.http.CookiesNamed(sessionCookieName(r.secure))
	if len(cookies) != 1 || len(cookies[0].Value) != sessionIDLen { // of two cookies, one is not ours
		return ""
	}
	return cookies[0].Value
}

// loadSession fills in the session and its actor. Without a valid session it leaves both empty.
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
			return nil // MANAGEMENT_TOKEN has changed
		}
		r.actor = environmentActor()
	case row.keyValid:
		r.actor = actor{row.key, row.name, role(row.role)}
	default:
		return nil
	}
	r.session = &row
	// A page that refreshes itself does not keep a session alive: nobody may be at the screen.
	if now >= row.seenAt+sessionTouchInterval.Milliseconds() && r.http.Header.Get("X-Auto-Refresh") == "" {
		if err := ui.store.touchSession(r.ctx, row.hash, now); err != nil {
			return errStoreUnavailable(err)
		}
	}
	return nil
}

// managementTokenProof binds a session to the current MANAGEMENT_TOKEN. Without the session's id,
// which is not stored, it reveals nothing about the token.
func (ui *adminUI) managementTokenProof(id string) []byte {
	if ui.cfg.managementToken == nil {
		return nil
	}
	sum := sha256.Sum256([]byte("llm-proxy session v1|" + id + "|" + ui.cfg.managementToken()))
	return sum[:]
}

// A signInView is the data of templates/sign-in.html.
type signInView struct {
	Next        string
	Kept        string // the input of a form that was sent when the session had ended; see encodeKeptForm
	Unencrypted bool   // the connection leaves this machine without TLS
	WrongKey    bool
	WaitSeconds int64 // after too many wrong keys
}

func (ui *adminUI) signInPage(r *pageRequest) (*pageResponse, error) {
	next := localPath(r.query.Get("next"))
	if r.session != nil {
		return &pageResponse{redirect: next}, nil
	}
	v := signInView{Next: next, Unencrypted: r.isUnencrypted()}
	return showPage("sign-in", "Sign in", v), nil
}

func (r *pageRequest) isUnencrypted() bool { return !r.secure && !isLoopbackHost(r.http.Host) }

// signIn starts a session. It ends the previous session of the browser, whose id may have been planted.
func (ui *adminUI) signIn(r *pageRequest) (*pageResponse, error) {
	next := localPath(r.form.Get("next"))
	who, err := ui.auth.verifyKey(r.ctx, r.origin, r.http.Pattern, strings.TrimSpace(r.form.Get("key")), r.now)
	if e, ok := errors.AsType[*apiError](err); ok && e.status < 500 {
		v := signInView{Next: next, Kept: r.form.Get("kept"), Unencrypted: r.isUnencrypted(),
			WrongKey: e.retryAfter == 0}
		if e.retryAfter > 0 {
			v.WaitSeconds = int64(e.retryAfter/time.Second) + 1
		}
		return &pageResponse{template: "sign-in", title: "Sign in", status: e.status, data: v}, nil
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
	var previous []byte
	if old := r.sessionID(); old != "" {
		sum := sha256.Sum256([]byte(old))
		previous = sum[:]
	}
	r.origin.actorID, r.origin.role = who.id, who.role
	if err := ui.store.addSession(r.ctx, r.origin, row, r.now.Add(-maxSessionAge).UnixMilli(), previous); err != nil {
		return nil, err
	}
	ui.keptForms.put(row.hash, next, r.form.Get("kept"), r.now)
	return &pageResponse{redirect: next, cookie: sessionCookie(r.secure, id)}, nil
}

// localPath returns next if it is a path of these pages, otherwise their start: a link to the
// sign-in page must not lead to another site.
func localPath(next string) string {
	const home = "/admin/"
	u, err := url.Parse(next)
	isUnsafe := func(c rune) bool { return c <= ' ' || c > '~' || c == '\\' }
	switch {
	case err != nil, u.Scheme != "", u.Host != "", u.User != nil, u.Opaque != "", strings.ContainsFunc(next, isUnsafe),
		!strings.HasPrefix(u.Path, home), path.Clean(u.Path) != strings.TrimSuffix(u.Path, "/"),
		strings.HasPrefix(u.Path, "/admin/sign-"):
		return home
	}
	return (&url.URL{Path: u.Path, RawQuery: u.RawQuery}).String()
}

func (ui *adminUI) signOut(r *pageRequest) (*pageResponse, error) {
	return r.signedOut("signed-out", ui.store.endSession(r.ctx, r.origin, r.session.hash))
}

func (ui *adminUI) signOutEverywhere(r *pageRequest) (*pageResponse, error) {
	return r.signedOut("signed-out-everywhere", ui.store.endKeySessions(r.ctx, r.origin, r.actor.id))
}

// signedOut removes the cookie once the session has ended.
func (r *pageRequest) signedOut(done string, err error) (*pageResponse, error) {
	p := redirectTo("/admin/sign-in", done)
	p.cookie = sessionCookie(r.secure, "")
	return p, err
}

// An accountView is the data of templates/account.html.
type accountView struct {
	ID, Name              string
	Role                  role
	Sessions              []sessionView
	IdleMinutes, MaxHours int
}

type sessionView struct {
	Address                   string
	CreatedAt, SeenAt, EndsAt timestamp
	IsThis                    bool
}

func (ui *adminUI) accountPage(r *pageRequest) (*pageResponse, error) {
	usedSince := r.now.Add(-sessionIdleTimeout).UnixMilli()
	rows, err := ui.store.sessionsByKey(r.ctx, r.actor.id, r.now.UnixMilli(), usedSince)
	if err != nil {
		return nil, err
	}
	v := accountView{ID: r.actor.id, Name: r.actor.name, Role: r.actor.role,
		IdleMinutes: int(sessionIdleTimeout.Minutes()), MaxHours: int(maxSessionAge.Hours())}
	for i := range rows {
		row := &rows[i]
		v.Sessions = append(v.Sessions, sessionView{Address: row.address, IsThis: bytes.Equal(row.hash, r.session.hash),
			CreatedAt: timestamp(row.createdAt), SeenAt: timestamp(row.seenAt),
			EndsAt: timestamp(row.createdAt + maxSessionAge.Milliseconds())})
	}
	return showPage("account", "Your access", v), nil
}
