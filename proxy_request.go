// This room reads what a client asks for: the endpoint, the query, and the body
// within its limits. It decides nothing about rights.
package main

import (
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"
)

// readCall finds out what the call wants: its endpoint, its body within the limits,
// and from the body what limits and metering must know.
func (p *proxy) readCall(c *call, w http.ResponseWriter, r *http.Request) error {
	if r.Header["Upgrade"] != nil {
		return errUpgrade
	}
	m, err := p.endpoints.match(r.Method, r.URL)
	if err != nil {
		return endpointError(w, err, m)
	}
	c.match, c.endpoint = m, m.endpoint
	if c.query, err = cleanQuery(r.URL.RawQuery); err != nil {
		return asClientError(err)
	}
	for _, name := range [...]string{"Content-Type", "Content-Encoding"} {
		if len(r.Header[name]) > 1 { // we would go by one of them, the provider perhaps by the other
			return errRepeatedHeader(name)
		}
	}
	if ce := r.Header.Get("Content-Encoding"); ce != "" && !strings.EqualFold(ce, "identity") {
		return errEncodedBody
	}
	if c.bufferStream, err = wantsBufferedStream(r.Header, c.project); err != nil {
		return err
	}
	form, err := isForm(c.endpoint, r.Header.Get("Content-Type"))
	if err != nil {
		return err
	}
	c.form = form
	switch {
	case c.endpoint.body == bodyNone:
		c.fields.model = m.model
		return rejectBody(r.Body)
	case c.endpoint.upload && form:
		return nil // streamed
	}
	begun := time.Now()
	if c.body, err = p.readBody(c, r); err != nil {
		return err
	}
	c.times.bodyRead = time.Since(begun)
	switch {
	case c.endpoint.body == bodyRaw:
	case form:
		c.fields, err = scanForm(r.Header.Get("Content-Type"), c.body)
	default:
		c.fields, err = scanJSON(c.body)
	}
	if err != nil {
		return asClientError(err)
	}
	return nil
}

func endpointError(w http.ResponseWriter, err error, m endpointMatch) error {
	if errors.Is(err, errWrongMethod) {
		w.Header().Set("Allow", m.allow)
		return errMethodNotAllowed(m.allow)
	}
	return errUnknownEndpoint
}

func asClientError(err error) error {
	if e, ok := errors.AsType[*bodyError](err); ok {
		return badRequest("invalid_request", e.param, e.msg)
	}
	return asAPIError(err)
}

// isForm reports whether the body is a form (else JSON), or refuses its type.
func isForm(e *endpoint, contentType string) (bool, error) {
	if e.body == bodyNone || e.body == bodyRaw {
		return false, nil
	}
	if contentType == "application/json" && e.body != bodyForm { // nearly always
		return false, nil
	}
	t, params, err := mime.ParseMediaType(contentType)
	switch {
	case err == nil && t == "application/json" && e.body != bodyForm:
		// In another charset the same bytes may be another JSON text: in UTF-7
		// "+AG0-odel" is "model".
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

// rejectBody refuses what an endpoint without a body would drop in silence. An
// empty object is what some clients send for nothing.
func rejectBody(body io.Reader) error {
	const most = 16
	b, err := io.ReadAll(io.LimitReader(body, most))
	if text := strings.TrimSpace(string(b)); err != nil || len(b) == most || text != "" && text != "{}" {
		return errUnexpectedBody
	}
	return nil
}

// readBody reads the body whole: the provider then gets it in one write, and
// the connection to the client is not torn by an answer that comes early.
func (p *proxy) readBody(c *call, r *http.Request) ([]byte, error) {
	if r.ContentLength > p.cfg.maxBodyBytes {
		return nil, errBodyTooLarge(p.cfg.maxBodyBytes)
	}
	const step = 64 << 10
	size := int64(step)
	if r.ContentLength >= 0 {
		size = min(r.ContentLength, step) // a declared length is a claim: memory follows what comes
	}
	c.setPhase(phaseReading)
	buf := make([]byte, 0, size+1) // one byte more, to meet the end without growing
	for {
		if int64(cap(buf)) > c.bodyReserved {
			if err := p.reserveBody(c, int64(cap(buf))); err != nil {
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
			buf = append(buf[:cap(buf)], 0)[:len(buf)] // grows by append's own rule
		}
	}
}

// reserveBody makes the call hold n bytes of the memory for bodies. One token gets
// a quarter of it, and always enough for one body of the largest size: it must
// not be able to keep all others out.
func (p *proxy) reserveBody(c *call, n int64) error {
	more := n - c.bodyReserved
	if of := c.token.bodyBytes.Add(more); of > max(p.bodies.limit/4, p.cfg.maxBodyBytes+1) && of > n {
		c.token.bodyBytes.Add(-more)
		return errTokenBodyMemory()
	}
	if !p.bodies.reserve(more) {
		c.token.bodyBytes.Add(-more)
		return errBodyMemoryFull()
	}
	c.bodyReserved = n
	return nil
}

func (p *proxy) releaseBody(c *call) {
	c.token.bodyBytes.Add(-c.bodyReserved)
	p.bodies.release(c.bodyReserved)
}

// A progressReader tells the watchdog how an upload moves: while it does, the
// provider is not late with its answer; when it hardly does, the client is.
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
