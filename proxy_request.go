// This file reads what the client asks for: the endpoint, the query, and the body within its limits. It decides
// nothing about rights.
package main

import (
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// readCall fills in the call's clientRequest: the endpoint, the body, and the fields of the body that policies,
// limits and metering need.
func (p *proxy) readCall(c *call, w http.ResponseWriter, r *http.Request) error {
	if r.Header["Upgrade"] != nil {
		return errUpgrade
	}
	m, err := p.endpoints.match(r.Method, r.URL)
	switch {
	case errors.Is(err, errWrongMethod):
		w.Header().Set("Allow", m.allow)
		return errMethodNotAllowed(m.allow)
	case err != nil:
		return errUnknownEndpoint
	}
	c.match, c.endpoint = m, m.endpoint
	if c.query, err = cleanQuery(r.URL.RawQuery); err != nil {
		return asClientError(err)
	}
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
		c.fields.model = m.model
		return rejectBody(r.Body)
	case c.endpoint.upload && c.form:
		return nil // streamed
	}
	readAt := time.Now()
	if c.body, err = p.readBody(c, r); err != nil {
		return err
	}
	c.times.bodyRead = time.Since(readAt)
	switch {
	case c.endpoint.body == bodyRaw:
	case c.form:
		c.fields, err = scanForm(r.Header.Get("Content-Type"), c.body)
	default:
		c.fields, err = scanJSON(c.body)
	}
	if err != nil {
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

// isForm reports whether the body is a form, not JSON; any other type is an error.
func isForm(e *endpoint, contentType string) (bool, error) {
	if e.body == bodyNone || e.body == bodyRaw {
		return false, nil
	}
	if contentType == "application/json" && e.body != bodyForm { // the usual case
		return false, nil
	}
	t, params, err := mime.ParseMediaType(contentType)
	switch {
	case err == nil && t == "application/json" && e.body != bodyForm:
		// In another charset the same bytes may be another text: in UTF-7 "+AG0-odel" is "model".
		if charset, ok := params["charset"]; ok && !strings.EqualFold(charset, "utf-8") {
			return false, errCharset
		}
		return false, nil
	case err == nil && t == "multipart/form-data" && e.body != bodyJSON:
		return true, nil
	}
	want := "application/json"
	if e.body == bodyForm {
		want = "multipart/form-data"
	}
	return false, errContentType(want)
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
	const step = 64 << 10
	size := int64(step)
	if r.ContentLength >= 0 {
		size = min(r.ContentLength, step) // memory follows the bytes that arrive, not the declared length
	}
	c.setPhase(phaseReading)
	buf := make([]byte, 0, size+1) // one more byte, to find the end without growing
	for {
		if more := int64(cap(buf)) - c.memory.reserved; more > 0 {
			if err := c.memory.reserve(more); err != nil {
				return nil, err
			}
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
		if len(buf) == cap(buf) {
			buf = append(buf[:cap(buf)], 0)[:len(buf)] // grow as append does
		}
	}
}

// A bodyShare is what one call has reserved of the memory for bodies, for its token and in the whole program:
// the body, its copies with another model's name, a buffered stream, stored content. All that goes in comes out
// again in releaseAll, so neither count can drift. It belongs to the call's goroutine.
type bodyShare struct {
	memory   *bodyMemory
	token    *atomic.Int64 // what the token's calls have reserved together
	max      int64         // of token, unless this call alone has all of it
	reserved int64
}

// newBodyShare returns the share of a call. One token gets at most a quarter of the memory, so that it cannot keep
// out all others, but always enough for one body of the largest size.
func (p *proxy) newBodyShare(t *liveToken) bodyShare {
	return bodyShare{memory: p.bodies, token: &t.bodyBytes, max: max(p.bodies.limit/4, p.cfg.maxBodyBytes+1)}
}

// reserve reserves n more bytes.
func (s *bodyShare) reserve(n int64) error {
	if used := s.token.Add(n); used > s.max && used > s.reserved+n {
		s.token.Add(-n)
		return errTokenBodyMemory()
	}
	if !s.memory.reserve(n) {
		s.token.Add(-n)
		return errBodyMemoryFull()
	}
	s.reserved += n
	return nil
}

func (s *bodyShare) release(n int64) {
	s.reserved -= n
	s.token.Add(-n)
	s.memory.release(n)
}

func (s *bodyShare) releaseAll() { s.release(s.reserved) }

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
		r.c.progress.uploading.Store(false)
	}
	if n > 0 && phase(r.c.progress.phase.Load()) == phaseProvider {
		r.c.setPhase(phaseProvider)
	}
	return n, err
}
