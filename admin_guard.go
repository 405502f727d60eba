// This room guards /admin against other web sites: which host names and origins a
// request may have, and the headers that keep browsers from doing what the pages
// never ask for.
package main

import (
	"net"
	"net/http"
	"net/netip"
	"strings"
)

func errPageMethod() *apiError {
	return &apiError{status: http.StatusMethodNotAllowed, code: "method_not_allowed", msg: "This address does not take this method."}
}

// guardPages sets the headers that every answer has, and refuses host names that
// are not ours and requests that another site may have caused.
func (s *server) guardPages(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		secure := s.secureRequest(r)
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "+
			"form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
		h.Set("Referrer-Policy", "no-referrer")
		if !secure && !isLoopbackHost(r.Host) {
			// There browsers send no Sec-Fetch-Site, and with no-referrer they also
			// hide the Origin of our own forms.
			h.Set("Referrer-Policy", "same-origin")
		}
		switch {
		case !s.ourHost(r.Host):
			s.refusePage(w, r, &apiError{status: http.StatusMisdirectedRequest, code: "unknown_host",
				msg: "This host name is not the proxy's. Set PUBLIC_URL if it should be."})
		case r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodPost:
			h.Set("Allow", "GET, HEAD, POST")
			s.refusePage(w, r, errPageMethod())
		case r.Method == http.MethodPost && !sameOrigin(r, secure):
			s.refusePage(w, r, &apiError{status: http.StatusForbidden, code: "cross_origin", msg: "The request comes from a page of another site."})
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// secureRequest reports whether the browser came over TLS: to us, or to what
// stands before us and answers for PUBLIC_URL.
func (s *server) secureRequest(r *http.Request) bool {
	public := s.cfg.publicURL
	return r.TLS != nil || public != nil && public.Scheme == "https" && strings.EqualFold(r.Host, public.Host)
}

func isLoopbackHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// sameOrigin reports whether a browser says that a request comes from our own
// pages. One that says nothing at all is not believed: every browser sends one
// of the two with a form.
func sameOrigin(r *http.Request, secure bool) bool {
	if site := r.Header["Sec-Fetch-Site"]; len(site) > 0 {
		return len(site) == 1 && (site[0] == "same-origin" || site[0] == "none")
	}
	scheme := "http"
	if secure {
		scheme = "https"
	}
	origin := r.Header["Origin"]
	return len(origin) == 1 && strings.EqualFold(origin[0], scheme+"://"+r.Host)
}
