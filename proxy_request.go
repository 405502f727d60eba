// This file reads what the client asks for: the endpoint, the query, and the body within its limits. It decides
// nothing about rights.
package main

import (
	"cmp"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// readCall fills in the call's clientRequest: the endpoint, the body, and the fields of the body that policies,
// limits and metering need.
func (p *proxy) readCall(c *call, w http.ResponseWriter, r *http.Request) error {
	if offersWebSocket(r.Header["Upgrade"]) {
		w.Header()["Upgrade"], w.Header()["Connection"] = []string{"HTTP/1.1"}, []string{"Upgrade"}
		return errUpgrade
	}
	m, err := p.endpoints.match(r.Method, r.URL)
	switch {
	case errors.Is(err, errWrongMethod):
		w.Header().Set("Allow", m.allow)
		return errMethodNotAllowed(m.allow)
	case err != nil:
		return errUnknownPath(errUnknownEndpoint, r.URL)
	}
	c.match, c.endpoint = m, m.endpoint
	queryModel, err := checkQuery(r.URL.RawQuery, c.endpoint)
	if err != nil {
		return asClientError(err)
	}
	c.query = r.URL.RawQuery
	for _, name := range [...]string{"Content-Type", "Content-Encoding"} {
		if len(r.Header[name]) > 1 { // the provider might use another one than the proxy
			return errRepeatedHeader(name)
		}
	}
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return errEncodedBody
	}
	if c.bufferStream, err = wantsBufferedStream(r.Header, c.project); err != nil {
		return err
	}
	if c.form, err = isForm(c.endpoint, r.Header.Get("Content-Type")); err != nil {
		return err
	}
	switch {
	case c.endpoint.body == bodyNone:
		c.fields.model = cmp.Or(m.model, queryModel)
		c.limitUnreadBody(r)
		defer c.unlimitReads(r)
		return rejectBody(r.Body)
	case c.endpoint.upload && c.form:
		return nil // streamed
	}
	readAt := time.Now()
	if c.body, err = p.readBody(c, r); err != nil {
		return err
	}
	c.times.bodyRead = time.Since(readAt)
	if c.fields, err = c.match.scanBody(c.form, r.Header.Get("Content-Type"), c.body); err != nil {
		return asClientError(err)
	}
	return nil
}

// asClientError turns an error about the request itself into a 400.
func asClientError(err error) error {
	if e, ok := errors.AsType[*bodyError](err); ok {
		return badRequest("invalid_request", e.param, e.msg)
	}
	return asAPIError(err)
}

// rejectBody refuses a body that the endpoint would silently ignore. Some clients send an empty object.
func rejectBody(body io.Reader) error {
	const maxLen = 16
	b, err := io.ReadAll(io.LimitReader(body, maxLen))
	if text := strings.TrimSpace(string(b)); err != nil || len(b) == maxLen || text != "" && text != "{}" {
		return errUnexpectedBody
	}
	return nil
}

// readBody reads the whole body: the provider gets it in one write, and an early answer does not break the
// client's connection.
func (p *proxy) readBody(c *call, r *http.Request) ([]byte, error) {
	if r.ContentLength > p.cfg.maxBodyBytes {
		return nil, errBodyTooLarge(p.cfg.maxBodyBytes)
	}
	c.setPhase(phaseReading)
	var buf []byte
	for {
		if have := int64(len(buf)); len(buf) == cap(buf) {
			size := min(bodyBufferSize(r.ContentLength, have), p.cfg.maxBodyBytes+1)
			if err := c.memory.reserve(size - have); err != nil {
				return nil, err
			}
			buf = append(make([]byte, 0, size), buf...)
		}
		n, err := r.Body.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		c.progress.bytesReceived.Store(int64(len(buf)))
		if int64(len(buf)) > p.cfg.maxBodyBytes {
			return nil, errBodyTooLarge(p.cfg.maxBodyBytes)
		}
		if err == io.EOF {
			return buf, nil
		}
		if err != nil {
			if cause := abortCause(c.ctx); cause != nil {
				return nil, cause
			}
			return nil, errRequestCut.withCause(err)
		}
	}
}

// newBodyShare returns the share of a call. One token gets at most a quarter of the memory, so that it cannot keep
// out all others, but always enough for one body of the largest size.
func (p *proxy) newBodyShare(t *liveToken) bodyShare {
	return bodyShare{memory: p.bodies, token: &t.bodyBytes, max: max(p.bodies.limit/4, p.cfg.maxBodyBytes+1)}
}

// A progressReader reports the progress of an upload to the watchdog: the provider's time to answer starts again
// with each read, and a client that sends too slowly is noticed.
type progressReader struct {
	io.ReadCloser
	c *runningCall
}

func (r *progressReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.c.progress.bytesReceived.Add(int64(n))
	if err != nil {
		r.c.progress.uploaded.Store(err == io.EOF)
		r.c.progress.uploading.Store(false)
	}
	if n > 0 && phase(r.c.progress.phase.Load()) == phaseProvider {
		r.c.setPhase(phaseProvider)
	}
	return n, err
}

// endUpload closes an upload's body. ReverseProxy leaves it open, and its transport may still read it, which would
// spoil the next request on the connection. endUpload waits for that read and for what is left of the body, so that
// the connection can be used again, but not for a client that has stopped sending.
func (c *call) endUpload(body io.Closer) {
	if !c.progress.uploaded.Load() {
		deadline := time.Now().Add(unreadBodyGrace)
		if c.ctx.Err() != nil {
			deadline = time.Unix(1, 0)
		}
		_ = c.controller.SetReadDeadline(deadline)
	}
	body.Close()
}

// unreadBodyGrace is how long a client may take to send the rest of a body that is not read.
const unreadBodyGrace = time.Second

// limitUnreadBody sets the deadline for a body that the proxy does not read. net/http reads what is left of it
// before it answers, to keep the connection: a client must not hold the connection by sending nothing.
func (c *call) limitUnreadBody(r *http.Request) {
	if r.ContentLength != 0 {
		_ = c.controller.SetReadDeadline(time.Now().Add(unreadBodyGrace))
	}
}

// unlimitReads takes the deadline back: net/http keeps reading, to notice when the client leaves.
func (c *call) unlimitReads(r *http.Request) {
	if r.ContentLength != 0 && c.ctx.Err() == nil {
		_ = c.controller.SetReadDeadline(time.Time{})
	}
}

// closeIfUnread makes the answer the last one on its HTTP/1 connection if it begins before the upload has ended:
// net/http could take the rest of the body for the next request.
func (c *call) closeIfUnread(h http.Header) {
	if c.fullDuplex && !c.progress.uploaded.Load() {
		h.Set("Connection", "close")
	}
}

// errUnknownPath returns a 404 that names the path, so that a wrong base URL shows, and says which one is right. It
// leaves out a path that is too long to read, or may contain a credential.
func errUnknownPath(e *apiError, u *url.URL) *apiError {
	path := u.EscapedPath()
	named := *e
	if len(path) <= 200 && isAlphanumericOr(path, "/._-~:@!$&'()*+,;=%[]") && // what a URL may have, escaped or not
		!strings.Contains(u.Path, tokenPrefix) && !strings.Contains(u.Path, manageKeyPrefix) {
		named.msg += " The path is " + path + "."
	}
	named.msg += " The base URL is this proxy's address: with /v1 for OpenAI's SDKs, without /v1 for Anthropic's" +
		" and Google's."
	return &named
}
