// This file holds what the provider's answer passes through on its way to the client: the checks of a stream before
// any of it leaves, and the writer, which drops what must not reach a client (1xx, trailers, upgrades, the
// provider's key) and shows every byte to the meter. proxy_headers.go has the allow-lists of headers.
package main

import (
	"bytes"
	"cmp"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// A peekedBody is the body of an answer whose first bytes have been read already. Read returns them again.
type peekedBody struct {
	io.ReadCloser
	peeked   []byte // the first bytes
	unread   []byte // the part of peeked that Read has not returned yet
	complete bool   // peeked is the whole body
}

func (b *peekedBody) Read(p []byte) (int, error) {
	if len(b.unread) == 0 && !b.complete {
		return b.ReadCloser.Read(p)
	}
	n := copy(p, b.unread)
	if b.unread = b.unread[n:]; b.complete && len(b.unread) == 0 {
		return n, io.EOF
	}
	return n, nil
}

// peekBody returns the first bytes of an answer's body and leaves them in it.
func peekBody(res *http.Response) []byte {
	if b, ok := res.Body.(*peekedBody); ok {
		return b.peeked
	}
	head, err := io.ReadAll(io.LimitReader(res.Body, maxPeekBytes))
	res.Body = &peekedBody{
		ReadCloser: res.Body, peeked: head, unread: head, complete: err == nil && len(head) < maxPeekBytes}
	return head
}

// checkStart reads as much of an answer with status 200 as shows whether another upstream should answer instead, and
// leaves what it has read in the body. It returns a *streamError if the answer cannot be used; if it is an error,
// the attempt's fault says which. Once the answer has begun, it may pause for the idle timeout.
func (a *attempt) checkStart(res *http.Response) error {
	if encoding := res.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return nil
	}
	declaredSSE := mediaType(res.Header.Get("Content-Type")) == "text/event-stream"
	check := answerCheck{kind: a.t.c.endpoint.meter, declaredSSE: declaredSSE}
	check.scan.reset(false)
	size := 4 << 10
	if n := res.ContentLength; n >= 0 && n < maxPeekBytes {
		size = int(n) + 1
	}
	body, head := res.Body, make([]byte, 0, size)
	for {
		n, err := body.Read(head[len(head):cap(head)])
		head = head[:len(head)+n]
		done := n > 0 && check.feed(head[len(head)-n:], head)
		if err == io.EOF && !done {
			check.end(head)
		}
		switch {
		case done || err == io.EOF:
			res.Body = &peekedBody{ReadCloser: body, peeked: head, unread: head, complete: err == io.EOF}
			if check.errorText != nil {
				a.fault = judgeEmbedded(check.errorText, retryHint(res.Header.Get, time.Now()))
			}
			if check.problem != "" {
				body.Close()
				return &streamError{check.problem}
			}
			return nil
		case err != nil:
			body.Close()
			return err
		}
		if check.format == formatJSON {
			idle := time.Duration(a.upstream.settings.IdleMS) * time.Millisecond
			a.timer.Reset(cmp.Or(idle, a.t.p.cfg.streamIdleTimeout))
			a.t.c.setPhase(phaseProvider)
		}
		if len(head) == cap(head) {
			head = slices.Grow(head, len(head))
		}
	}
}

// A responseWriter is the http.ResponseWriter that ReverseProxy writes to. Its header map leads nowhere: only
// headers that prepare has copied reach the client, so neither a 1xx nor a trailer does. It has no Hijack and no
// Unwrap, so no upgrade passes. It has no Flush: it decides itself when bytes leave, which is at once. Only the head
// may wait a moment for the first bytes of the body, and the last bytes for the end of the handler, to save a write.
type responseWriter struct {
	p      *proxy
	c      *call
	client http.ResponseWriter
	header http.Header
	body   answerBody
	framed bool // net/http may choose how the answer's end is told: it has a length, or its head has left

	headTimer   *time.Timer    // sends the head if no body follows; nil: the call's goroutine alone uses client
	headSending sync.WaitGroup // for its goroutine

	pings    pinger // of a buffered stream
	headSent bool   // pings have sent the head already, with status 200
	broken   bool   // the answer ends with an error event, and visibly broken

	meter             *meter       // nil until prepare
	watch             *meter       // of an answer that may show a background response; nil: it cannot
	batch             *batchAnswer // of an answer that may show batches or their results; nil: it cannot
	keyMask           keyMask
	sse               bool
	providerRequestID string // the provider's id of this request
	interim           int    // 1xx answers so far; only net/http's callback for them uses it
	status            int
	clientGone        bool // a write to the client failed
}

// newResponseWriter returns the call's writer, of which it has one at most.
func newResponseWriter(p *proxy, c *call, client http.ResponseWriter) *responseWriter {
	c.responseSpace = responseWriter{p: p, c: c, client: client, header: http.Header{}}
	return &c.responseSpace
}

func (w *responseWriter) Header() http.Header { return w.header }

// An answerBody is the body of the provider's answer as ReverseProxy reads it for w.
type answerBody struct {
	io.ReadCloser
	w      *responseWriter
	peeked bool // its first bytes, or its end, are in memory
	ended  bool // it was read to its end
}

func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.ended = err == io.EOF; err != nil && !b.ended {
		// A client that gets no head takes the call for one that never arrived, and sends it again.
		_ = b.w.flush()
	}
	return n, err
}

// prepare reads the head of the provider's answer: it chooses the meter and copies the allowed headers to the
// client's. It leaves nothing in res by which ReverseProxy would flush.
func (w *responseWriter) prepare(res *http.Response) {
	w.keyMask = w.c.upstream.newKeyMask()
	kind, contentType := w.c.endpoint.meter, mediaType(headerValue(res.Header, "Content-Type"))
	encoded := headerValue(res.Header, "Content-Encoding")
	opaque := encoded != "" && encoded != "identity"
	if w.sse = contentType == "text/event-stream"; w.sse {
		w.p.metrics.activeStreams.Add(1) // until settle
	}
	if res.StatusCode >= 400 || res.StatusCode == http.StatusNoContent {
		kind = meterNone // an error is not billed
	}
	usageAdded := w.c.usageAdded && !w.c.attempts.current.plain
	w.meter = w.p.meters.Get().(*meter).renew(kind, w.sse, opaque, usageAdded) // leave gives it back
	w.meter.scan.readID = w.c.endpoint.makesResponse()
	if w.c.endpoint.showsResponse() && res.StatusCode < 300 {
		w.watch = newMeter(meterOpenAI, w.sse, opaque, false)
		if w.c.endpoint.api == apiGemini {
			w.watch.kind = meterGemini
		}
		w.watch.scan.readID = true
	}
	if res.StatusCode < 300 && !opaque && !w.c.headOnly {
		w.batch = newBatchAnswer(w.c.endpoint, w.c.upstream, w.c.match.path, w.c.prices, w.c.project.multiplier)
		w.batch.setBody(&w.c.memory, res.StatusCode == http.StatusPartialContent)
	}

	to := w.client.Header()
	w.c.cached.accept(w.p, w.c, res)
	for name, values := range res.Header {
		if allowResponseHeader(name) && !w.keyMask.containsKey(values) {
			to[name] = values
			w.c.cached.addHeader(name, values)
			if isRequestID(name) && (w.providerRequestID == "" || name == "X-Request-Id" || name == "Request-Id") {
				w.providerRequestID = clip(values[0], 128)
			}
		}
	}
	if _, ok := to["Content-Type"]; !ok {
		to["Content-Type"] = nil // net/http would guess one from the body
	}
	if w.c.project.routing.ShowUpstream {
		to["X-Llm-Proxy-Upstream"] = []string{w.c.upstream.id}
	}
	if usageAdded {
		to.Del("Content-Length") // whatever the type says, an event may be left out
	}
	to["Cache-Control"] = w.p.noStore
	if w.sse {
		setStreamHeaders(to)
	}
	_, peeked := res.Body.(*peekedBody)
	w.body = answerBody{ReadCloser: res.Body, w: w, peeked: peeked}
	w.framed = res.ContentLength >= 0
	res.Body, res.Header, res.ContentLength = &w.body, nil, 0
}

// headDelay is how long the head of an answer waits for the first bytes of the body.
const headDelay = 10 * time.Millisecond

// maxInterimAnswers is how many 1xx answers a provider may send before its own: enough for one a second, as a sign of
// life, for UPSTREAM_TIMEOUT.
const maxInterimAnswers = 1000

// WriteHeader sends the head to the client, after headDelay at most.
func (w *responseWriter) WriteHeader(status int) {
	if status < 200 {
		if w.interim++; w.interim > maxInterimAnswers {
			w.c.cancel(errUpstreamProtocol(status)) // net/http leaves their limit to whoever gets them
		}
		return
	}
	if w.status != 0 {
		return
	}
	w.status = status
	w.c.times.firstByte = time.Since(w.c.start)
	if w.headSent {
		w.framed = true
		return
	}
	w.c.closeIfUnread(w.client.Header())
	if w.p.running.isDraining() {
		w.client.Header()["Connection"] = []string{"close"}
	}
	w.client.WriteHeader(status)
	if !w.body.peeked {
		w.headSending.Add(1)
		w.headTimer = time.AfterFunc(headDelay, func() { _ = w.c.controller.Flush(); w.headSending.Done() })
	}
}

// stopHeadTimer returns when no other goroutine uses the client's writer any more.
func (w *responseWriter) stopHeadTimer() {
	if w.headTimer != nil && !w.headTimer.Stop() {
		w.headSending.Wait()
		w.framed = true
	}
	w.headTimer = nil
}

// Write passes bytes of the answer on. It reports all of them as written even if it holds some back: otherwise
// ReverseProxy would stop.
func (w *responseWriter) Write(p []byte) (int, error) {
	if w.watch != nil {
		w.watch.process(p)
	}
	w.batch.process(p)
	rest := w.meter.process(w.keyMask.redact(p))
	w.c.progress.bytesRelayed.Add(int64(len(p)))
	if w.sse || w.meter.isStream() {
		w.c.progress.outputTokens.Store(max(w.meter.counts.output, w.meter.estimateOutput()))
	}
	if err := w.send(rest); err != nil {
		return 0, err
	}
	return len(p), nil
}

// send writes to the client and flushes, unless the handler is about to end. Before that, net/http would add a
// length to an answer that had none.
func (w *responseWriter) send(p []byte) error {
	if len(p) == 0 {
		w.c.setPhase(phaseRelaying)
		return nil
	}
	w.c.storedContent.addResponse(p)
	w.c.cached.add(w.p, w.c, p)
	w.c.setPhase(phaseWriting)
	w.stopHeadTimer()
	_, err := w.client.Write(p)
	if err == nil && !(w.body.ended && w.framed) {
		err = w.c.controller.Flush()
		w.framed = true
	}
	return w.endWrite(err)
}

// flush sends what net/http has buffered.
func (w *responseWriter) flush() error {
	w.c.setPhase(phaseWriting)
	w.stopHeadTimer()
	return w.endWrite(w.c.controller.Flush())
}

func (w *responseWriter) endWrite(err error) error {
	w.clientGone = w.clientGone || err != nil
	if err != nil && !w.c.cached.isAwaited(w.p) {
		return err
	}
	w.c.setPhase(phaseRelaying)
	return nil
}

// A pinger tells the client of a buffered stream that its call is alive. Pings are no part of an answer: they bind the
// call to status 200, but to no upstream. Between startPings and stopPings the timer's goroutine alone uses the
// client's writer.
type pinger struct {
	mu      sync.Mutex // held while a ping is written
	timer   *time.Timer
	sent    bool // the head has left
	stopped bool
}

// pingTimeout is how long a client may take to accept a ping.
const pingTimeout = 5 * time.Second

// startPings sends a ping whenever the client has got nothing for an interval. forward stops them.
func (w *responseWriter) startPings(interval time.Duration) {
	g := &w.pings
	g.mu.Lock()
	defer g.mu.Unlock()
	g.timer = time.AfterFunc(interval-time.Since(w.c.start), func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if next := interval; !g.stopped {
			if !w.ping() {
				next = min(interval, watchInterval)
			}
			g.timer.Reset(next)
		}
	})
}

// ping sends a ping, and before the first one the head. It returns false if it may not yet: no byte leaves before the
// call is on record.
func (w *responseWriter) ping() bool {
	select {
	case <-w.c.entry.committed():
	default:
		return false
	}
	if w.c.entry.commitErr() != nil || w.c.ctx.Err() != nil {
		return false
	}
	_ = w.c.controller.SetWriteDeadline(time.Now().Add(pingTimeout))
	if !w.pings.sent {
		w.pings.sent = true
		h := w.client.Header()
		h["Content-Type"] = []string{"text/event-stream; charset=utf-8"}
		setStreamHeaders(h)
		w.client.WriteHeader(http.StatusOK)
	}
	_, _ = w.client.Write(w.c.endpoint.eventForm().ping()) // if it fails, net/http ends the request's context
	_ = w.c.controller.Flush()
	_ = w.c.controller.SetWriteDeadline(time.Time{})
	return true
}

// stopPings returns when no ping is being written and none will be.
func (w *responseWriter) stopPings() {
	w.pings.mu.Lock()
	defer w.pings.mu.Unlock()
	if w.pings.stopped = true; w.pings.timer != nil {
		w.pings.timer.Stop()
	}
	w.headSent = w.pings.sent
}

// relayErrorEvent turns a provider's error into the last event of a stream whose head has left.
func (w *responseWriter) relayErrorEvent(res *http.Response) {
	event := w.c.endpoint.eventForm().errorEvent(peekBody(res))
	if event == nil {
		event = w.c.endpoint.eventForm().errorEvent(errUpstreamStatus(res.StatusCode).responseBody(w.c.shape))
	}
	res.Body.Close()
	res.Body, w.broken = io.NopCloser(bytes.NewReader(event)), true
}

// sendErrorEvent sends an error as the last event of a stream whose head has left.
func (w *responseWriter) sendErrorEvent(e *apiError) {
	_ = w.c.controller.SetWriteDeadline(time.Now().Add(pingTimeout))
	_, _ = w.client.Write(w.c.endpoint.eventForm().errorEvent(e.responseBody(w.c.shape)))
	_ = w.c.controller.Flush()
}

// finish sends what is still held back when the answer is complete.
func (w *responseWriter) finish() {
	if w.status == 0 {
		return
	}
	if rest := w.keyMask.flush(); len(rest) > 0 {
		_ = w.send(w.meter.process(rest))
	}
	_ = w.send(w.meter.finish())
}

// A keyMask replaces a provider's key in an answer by asterisks, even if the key comes in pieces: no answer may
// carry the key to a client, whatever a provider echoes.
type keyMask struct {
	key   string // the upstream's own: a copy for each call would be read from cold memory with each event
	rare  int    // the index of a byte of the key that is rare in answers: find looks for that byte
	carry []byte // the end of the last piece, if a key may begin there
	out   []byte // the last result of redact, if it had to join
	found bool   // the key was found
}

// newKeyMask returns a mask for the key of an upstream.
func (u *upstream) newKeyMask() keyMask { return newKeyMask(u.key()) }

func newKeyMask(key string) keyMask {
	rare := strings.LastIndexAny(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
	if rare < 0 {
		rare = max(0, len(key)-1)
	}
	return keyMask{key: key, rare: rare}
}

// find returns the index in p of the first key at or after at, or -1.
func (m *keyMask) find(p []byte, at int) int {
	rare := m.key[m.rare]
	for i := indexFrom(p, min(at+m.rare, len(p)), rare); i < len(p); i = indexFrom(p, i+1, rare) {
		if from := i - m.rare; len(p)-from >= len(m.key) && string(p[from:from+len(m.key)]) == m.key {
			return from
		}
	}
	return -1
}

// containsKey reports whether a header's values contain the key.
func (m *keyMask) containsKey(values []string) bool {
	for _, v := range values {
		if strings.Contains(v, m.key) {
			m.found = true
			return true
		}
	}
	return false
}

// redact returns the bytes of p, after those held back before, that the client may get now. It may write to p.
func (m *keyMask) redact(p []byte) []byte {
	if len(m.key) == 0 {
		return p
	}
	if len(m.carry) > 0 {
		m.out = append(append(m.out[:0], m.carry...), p...)
		m.carry, p = m.carry[:0], m.out
	}
	at := 0 // no key begins before
	for i := m.find(p, at); i >= 0; i = m.find(p, at) {
		m.found = true
		at = i + len(m.key)
		copy(p[i:at], bytes.Repeat([]byte{'*'}, len(m.key)))
	}
	tail := p[max(at, len(p)-len(m.key)+1):]
	for i := indexFrom(tail, 0, m.key[0]); i < len(tail); i = indexFrom(tail, i+1, m.key[0]) {
		if m.key[:len(tail)-i] == string(tail[i:]) { // tail is shorter than the key
			m.carry = append(m.carry, tail[i:]...)
			return p[:len(p)-len(tail)+i]
		}
	}
	return p
}

// flush returns the bytes held back when the answer ends: they are not a whole key.
func (m *keyMask) flush() []byte { return m.carry }

const maxBufferedStream = 16 << 20 // bytes; they count as BODY_MEMORY

// bufferStream reads a stream to its end and leaves it in the answer's body. It fails, and keeps nothing, if the
// stream breaks off, has no end mark, or has an event that is an error or is not JSON. The idle timeout starts
// again with each read.
func (a *attempt) bufferStream(res *http.Response) (err error) {
	c, idleTimeout := a.t.c, a.bufferIdleTimeout()
	body := res.Body
	defer body.Close()
	reserved := int64(0)
	defer func() {
		if err != nil {
			c.memory.release(reserved)
		}
	}()
	readable := res.Header.Get("Content-Encoding") == "" // otherwise the events cannot be checked
	var stream []byte
	var check streamCheck
	m := newMeter(c.endpoint.meter, true, !readable, false)
	for {
		if len(stream) == cap(stream) {
			size := min(max(2*len(stream), 32<<10), maxBufferedStream+1)
			if err := c.memory.reserve(int64(size) - reserved); err != nil {
				return err
			}
			reserved = int64(size)
			stream = append(make([]byte, 0, size), stream...)
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
	if a.fault = check.fault; a.fault.kind != faultNone {
		m.done = true // the error is the whole answer
	}
	// Some compatible providers never send an end mark. If no other upstream is left,
	// a finish reason is enough.
	if m.finish(); readable && c.endpoint.hasEndMarker() && !m.done && (!check.finished || a.t.hasAlternative()) {
		return &streamError{"ended the stream without an end mark"}
	}
	res.Body = &peekedBody{ReadCloser: http.NoBody, peeked: stream, unread: stream, complete: true}
	return nil
}

// bufferIdleTimeout returns how long a buffered stream may pause.
func (a *attempt) bufferIdleTimeout() time.Duration {
	idle := a.t.p.cfg.streamIdleTimeout
	if a.forSpare {
		idle = a.timeout
	}
	return cmp.Or(time.Duration(a.upstream.settings.IdleMS)*time.Millisecond, idle)
}
