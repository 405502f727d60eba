// This room is what stands between ReverseProxy and the client: which headers
// go up and down, and the writer that the provider's answer passes through. It
// swallows what must not reach a client (1xx, trailers, upgrades, the provider's
// key), and shows every byte to the meter on its way.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// A bufferPool lends ReverseProxy the buffers it copies with.
type bufferPool struct{ pool sync.Pool }

func newBufferPool(size int) *bufferPool {
	return &bufferPool{sync.Pool{New: func() any { return new(make([]byte, size)) }}}
}

func (p *bufferPool) Get() []byte { return *p.pool.Get().(*[]byte) }

func (p *bufferPool) Put(b []byte) { p.pool.Put(&b) }

const maxPeekBytes = 16 << 10 // of a provider's error that is read, to know what it is

// A peekedBody is an answer's body whose first bytes have been read.
type peekedBody struct {
	io.ReadCloser
	peeked   []byte
	unread   []byte // of head, not yet given out
	complete bool   // there is nothing after it
}

func (b *peekedBody) Read(p []byte) (int, error) {
	if len(b.unread) > 0 {
		n := copy(p, b.unread)
		b.unread = b.unread[n:]
		return n, nil
	}
	if b.complete {
		return 0, io.EOF
	}
	return b.ReadCloser.Read(p)
}

// peekBody returns the first bytes of a provider's error, and leaves them in
// its body.
func peekBody(res *http.Response) []byte {
	if b, ok := res.Body.(*peekedBody); ok {
		return b.peeked
	}
	head, err := io.ReadAll(io.LimitReader(res.Body, maxPeekBytes))
	res.Body = &peekedBody{res.Body, head, head, err == nil && len(head) < maxPeekBytes}
	return head
}

// A streamError says why a stream cannot be used, before any of it has reached the client.
type streamError struct{ reason string }

func (e *streamError) Error() string { return "the stream " + e.reason }

// awaitFirstEvent returns when the stream's first event with data is complete, and leaves everything it has
// read in the body. A stream that ends before, or whose first event is an error, is a *streamError.
func awaitFirstEvent(res *http.Response) error {
	head := make([]byte, 0, 4<<10)
	body := res.Body
	var events sseEvents
	for {
		n, err := body.Read(head[len(head):cap(head)])
		events.feed(head[len(head) : len(head)+n])
		head = head[:len(head)+n]
		if data, ok := events.nextData(); ok || len(head) >= maxEventBytes {
			if problem := parseStreamEvent(data).problem; ok && problem != "" {
				body.Close()
				return &streamError{problem}
			}
			res.Body = &peekedBody{body, head, head, false}
			return nil
		}
		if err != nil {
			body.Close()
			if err == io.EOF {
				return &streamError{"ended before its first event"}
			}
			return err
		}
		if len(head) == cap(head) {
			head = slices.Grow(head, len(head))
		}
	}
}

// A streamEvent is what one event shows about its stream.
type streamEvent struct {
	problem  string // "" unless the event is an error and nothing else, or is not JSON
	retry    bool   // it says that the answer failed for a reason that another attempt may not meet
	finished bool   // it says why the answer ends
}

// parseStreamEvent reads an event's data.
func parseStreamEvent(data []byte) (e streamEvent) {
	data = bytes.TrimSpace(data)
	if len(data) == 0 || string(data) == "[DONE]" {
		return e
	}
	var v struct {
		Type     any
		Error    json.RawMessage
		Response struct{ Error struct{ Code any } }
		Choices  []struct {
			FinishReason any `json:"finish_reason"`
		}
	}
	if _, ok := errors.AsType[*json.SyntaxError](json.Unmarshal(data, &v)); ok { // members of other types do not matter
		e.problem = "has an event that is not JSON"
	} else if v.Type == "error" || len(v.Error) > 0 && string(v.Error) != "null" {
		e.problem = "has an error in it"
	}
	code := v.Response.Error.Code // other codes are the call's own fault, and would come again
	e.retry = v.Type == "response.failed" && (code == "server_error" || code == "rate_limit_exceeded")
	for _, c := range v.Choices {
		e.finished = e.finished || c.FinishReason != nil
	}
	return e
}

// allowRequestHeader is the allow-list for request headers. Keys are canonical.
func allowRequestHeader(name string) bool {
	switch name {
	case "Content-Type", "Accept", "User-Agent", "Idempotency-Key", "X-Client-Request-Id", "Traceparent", "Tracestate":
		return true
	case "Openai-Organization", "Openai-Project":
		return false // they name the account that pays: the upstream's settings say which
	}
	return strings.HasPrefix(name, "Openai-") || strings.HasPrefix(name, "X-Stainless-") || strings.HasPrefix(name, "Anthropic-")
}

// upstreamHeader returns the headers that go to the provider, the key not yet among
// them. Those that the client's Connection header names are for this hop only;
// Content-Type is not the client's to take away.
func upstreamHeader(in http.Header) http.Header {
	out := make(http.Header, 8)
	for name, values := range in {
		if allowRequestHeader(name) {
			out[name] = values
		}
	}
	if _, ok := parseTraceparent(out["Traceparent"]); !ok { // else a stranger's text would be taken for a trace
		delete(out, "Traceparent")
		delete(out, "Tracestate")
	}
	for _, line := range in["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			if name = http.CanonicalHeaderKey(strings.TrimSpace(name)); name != "Content-Type" {
				delete(out, name)
			}
		}
	}
	if v, ok := out["Idempotency-Key"]; ok {
		// Under this name net/http takes it as leave to send a call again that
		// the provider has had already, which no limit and no row would know of.
		delete(out, "Idempotency-Key")
		out["idempotency-key"] = v
	}
	return out
}

// allowResponseHeader is the allow-list for answer headers. Keys are canonical. The
// provider's X-Ratelimit-* are not on it: they are the key's, which many tokens
// share; the token's own stand in their place (proxy_admit.go).
func allowResponseHeader(name string) bool {
	switch name {
	case "Content-Type", "Content-Length", "Content-Encoding", "Content-Disposition",
		"X-Request-Id", "Request-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry":
		return true
	case "Openai-Organization", "Openai-Project", "Anthropic-Organization-Id":
		return false // whose account it is
	}
	return strings.HasPrefix(name, "Openai-") || strings.HasPrefix(name, "Anthropic-")
}

// An responseWriter is the http.ResponseWriter that ReverseProxy writes to. Its
// header map leads nowhere: nothing reaches the client that expect did not put
// there, so no 1xx and no trailer does. It has no Hijack and no Unwrap.
type responseWriter struct {
	s      *proxy
	c      *call
	w      http.ResponseWriter
	header http.Header

	meter             *meter // nil until an answer came
	keyMask           keyMask
	sse               bool
	providerRequestID string // what the provider calls this request
	status            int
	clientGone        bool // the client did not take them
}

func newResponseWriter(s *proxy, c *call, w http.ResponseWriter) *responseWriter {
	return &responseWriter{s: s, c: c, w: w, header: http.Header{}}
}

func (a *responseWriter) Header() http.Header { return a.header }

// prepare takes over the head of the provider's answer: what may come down goes
// into the client's header.
func (a *responseWriter) prepare(res *http.Response) {
	a.keyMask = newKeyMask(a.c.upstream.key())
	kind, contentType := a.c.endpoint.meter, mediaType(res.Header.Get("Content-Type"))
	encoded := res.Header.Get("Content-Encoding")
	opaque := encoded != "" && encoded != "identity"
	if a.sse = contentType == "text/event-stream"; a.sse {
		a.s.metrics.activeStreams.Add(1) // until settle
	}
	if res.StatusCode >= 400 || !a.sse && contentType != "application/json" && !opaque {
		kind = meterNone // an error is not billed; audio and the like say nothing
	}
	a.meter = newMeter(kind, a.sse, opaque, a.c.usageAdded)

	to := a.w.Header()
	for name, values := range res.Header {
		if allowResponseHeader(name) && !a.keyMask.containsKey(values) {
			to[name] = values
			if name == "X-Request-Id" || name == "Request-Id" {
				a.providerRequestID = clip(values[0], 128)
			}
		}
	}
	if _, ok := to["Content-Type"]; !ok {
		to["Content-Type"] = nil // net/http would guess one from the body
	}
	if a.c.usageAdded && a.sse {
		to.Del("Content-Length")
	}
	if a.c.project.routing.ShowUpstream {
		to["X-Llm-Proxy-Upstream"] = []string{a.c.upstream.id}
	}
	if a.sse {
		to["Cache-Control"] = []string{"no-cache, no-store"}
		to["X-Accel-Buffering"] = []string{"no"} // nginx in front must not collect events
	} else {
		to["Cache-Control"] = []string{"no-store"}
	}
	if a.sse { // which ReverseProxy goes by to flush each event; nothing else of the head is its business any more
		res.Header = http.Header{"Content-Type": res.Header["Content-Type"]}
	} else {
		res.Header = nil
	}
}

// mediaType returns the type in a Content-Type header, "" if there is none.
func mediaType(header string) string {
	switch header { // nearly all are one of these
	case "application/json", "text/event-stream":
		return header
	case "text/event-stream; charset=utf-8":
		return "text/event-stream"
	}
	t, _, err := mime.ParseMediaType(header)
	if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) { // the type itself is clear then, and ReverseProxy goes by it
		return ""
	}
	return t
}

// WriteHeader sends the head to the client.
func (a *responseWriter) WriteHeader(status int) {
	if status < 200 || a.status != 0 {
		return
	}
	a.status = status
	a.c.times.firstByte = time.Since(a.c.start)
	a.w.WriteHeader(status)
}

// Write passes bytes of the answer on. It reports them all as written even
// where an event is held back, so that ReverseProxy goes on.
func (a *responseWriter) Write(p []byte) (int, error) {
	rest := a.meter.process(a.keyMask.redact(p))
	a.c.progress.bytesRelayed.Add(int64(len(p)))
	if a.sse {
		a.c.progress.outputTokens.Store(max(a.meter.counts.output, a.meter.estimateOutput()))
	}
	if err := a.send(rest); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (a *responseWriter) send(p []byte) error {
	if len(p) == 0 {
		a.c.setPhase(phaseRelaying)
		return nil
	}
	a.c.storedContent.addResponse(p)
	a.c.setPhase(phaseWriting)
	if _, err := a.w.Write(p); err != nil {
		a.clientGone = true
		return err
	}
	a.c.setPhase(phaseRelaying)
	return nil
}

// FlushError lets ReverseProxy push each event out at once.
func (a *responseWriter) FlushError() error {
	if a.status == 0 {
		return nil
	}
	a.c.setPhase(phaseWriting)
	err := a.c.controller.Flush()
	if err != nil {
		a.clientGone = true
	}
	a.c.setPhase(phaseRelaying)
	return err
}

// finish sends what is still held when the answer is complete.
func (a *responseWriter) finish() {
	if a.status == 0 {
		return
	}
	if rest := a.keyMask.flush(); len(rest) > 0 {
		_ = a.send(a.meter.process(rest))
	}
	_ = a.send(a.meter.finish())
}

// A keyMask replaces a provider key in an answer by asterisks, also where it is
// cut in two by the network: no answer may carry the key to a client, whatever
// a provider echoes.
type keyMask struct {
	key   []byte
	rare  int    // the index of a byte of the key that answers seldom have: the search goes by it
	carry []byte // the end of what came, if a key may begin there
	out   []byte // what pass returned last, when it had to join
	found bool   // a key was found
}

func newKeyMask(key string) keyMask {
	m := keyMask{key: []byte(key), rare: max(0, len(key)-1)}
	if i := strings.LastIndexFunc(key, func(r rune) bool { return r >= 'A' && r <= 'Z' }); i >= 0 {
		m.rare = i
	}
	return m
}

// find returns where in p[at:] the first key begins, as an index of p, or -1.
func (m *keyMask) find(p []byte, at int) int {
	for i := at + m.rare; i < len(p); i++ {
		next := bytes.IndexByte(p[i:], m.key[m.rare])
		if next < 0 {
			return -1
		}
		i += next
		if from := i - m.rare; len(p)-from >= len(m.key) && bytes.Equal(p[from:from+len(m.key)], m.key) {
			return from
		}
	}
	return -1
}

// containsKey reports whether a header's values hold the key.
func (m *keyMask) containsKey(values []string) bool {
	for _, v := range values {
		if strings.Contains(v, string(m.key)) {
			m.found = true
			return true
		}
	}
	return false
}

// redact returns what of p, and of what was held, can go on. It may write to p.
func (m *keyMask) redact(p []byte) []byte {
	if len(m.key) == 0 {
		return p
	}
	if len(m.carry) > 0 {
		m.out = append(append(m.out[:0], m.carry...), p...)
		m.carry, p = m.carry[:0], m.out
	}
	at := 0 // what is before it has been looked at
	for i := m.find(p, at); i >= 0; i = m.find(p, at) {
		m.found = true
		at = i + len(m.key)
		copy(p[i:at], bytes.Repeat([]byte{'*'}, len(m.key)))
	}
	tail := p[max(at, len(p)-len(m.key)+1):]
	for i := bytes.IndexByte(tail, m.key[0]); i >= 0; {
		if bytes.HasPrefix(m.key, tail[i:]) {
			m.carry = append(m.carry, tail[i:]...)
			return p[:len(p)-len(tail)+i]
		}
		next := bytes.IndexByte(tail[i+1:], m.key[0])
		if next < 0 {
			break
		}
		i += 1 + next
	}
	return p
}

// flush returns what was held and turned out not to be a key.
func (m *keyMask) flush() []byte { return m.carry }

// maxBufferedStream bounds a stream that is held. It counts as BODY_MEMORY.
const maxBufferedStream = 16 << 20

// wantsBufferedStream reports whether the call's stream is to be held: the client says
// so, or its project does and the client does not say otherwise.
func wantsBufferedStream(h http.Header, p *projectState) (bool, error) {
	switch v := h["X-Llm-Proxy-Stream"]; {
	case len(v) == 0:
		return p.routing.VerifiedStreams, nil
	case len(v) == 1 && (v[0] == "verified" || v[0] == "plain"):
		return v[0] == "verified", nil
	}
	return false, errStreamHeader
}

// bufferStream reads a stream to its end and leaves it in the answer's body, whole. A stream that is cut, has
// an event that is an error or is not JSON, or lacks its end is an error, and nothing of it is left. The
// idle timeout starts again with each read.
func (a *attempt) bufferStream(res *http.Response) (err error) {
	c, bodies, idleTimeout := a.t.c, a.t.p.bodies, a.bufferIdleTimeout()
	body := res.Body
	defer body.Close()
	reserved := int64(0)
	defer func() {
		if err != nil {
			bodies.release(reserved)
		}
	}()
	readable := res.Header.Get("Content-Encoding") == "" // otherwise only the stream's end can be seen
	var stream []byte
	var check streamCheck
	m := newMeter(c.endpoint.meter, true, !readable, false)
	for {
		if len(stream) == cap(stream) {
			stream = slices.Grow(stream, max(len(stream), 32<<10))
			if more := int64(cap(stream)) - reserved; !bodies.reserve(more) {
				return errBodyMemoryFull()
			}
			reserved = int64(cap(stream))
		}
		n, err := body.Read(stream[len(stream):cap(stream)])
		piece := stream[len(stream) : len(stream)+n]
		stream = stream[:len(stream)+n]
		m.process(piece)
		c.progress.outputTokens.Store(max(m.counts.output, m.estimateOutput())) // budgets hold for unseen output too
		a.timer.Reset(idleTimeout)
		c.setPhase(phaseProvider)
		if len(stream) > maxBufferedStream {
			return errStreamTooLarge(maxBufferedStream)
		}
		if readable {
			if problem := check.problem(piece); problem != "" {
				return &streamError{problem}
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	// Some compatible providers never send an end mark. Where no other upstream is left,
	// a reason to finish is as good.
	if m.finish(); readable && c.endpoint.hasEndMarker() && !m.done && (!check.finished || a.t.hasAlternative()) {
		return &streamError{"ended without its end mark"}
	}
	c.bodyReserved += reserved
	res.Body = &peekedBody{http.NoBody, stream, stream, true}
	return nil
}

// bufferIdleTimeout returns how long a buffered stream may pause.
func (a *attempt) bufferIdleTimeout() time.Duration {
	own := time.Duration(a.upstream.settings.IdleMS) * time.Millisecond
	return cmp.Or(own, a.timeout, a.t.p.cfg.streamIdleTimeout)
}

// A streamCheck checks the events of a stream as they come.
type streamCheck struct {
	events   sseEvents
	finished bool // an event said why the answer ends
}

// problem reads the next bytes and says what is wrong with the stream, "" if nothing is.
func (s *streamCheck) problem(p []byte) string {
	s.events.feed(p)
	for data, ok := s.events.nextData(); ok; data, ok = s.events.nextData() {
		e := parseStreamEvent(data)
		if e.problem != "" {
			return e.problem
		}
		if e.retry {
			return "has an error in it"
		}
		s.finished = s.finished || e.finished
	}
	return ""
}
