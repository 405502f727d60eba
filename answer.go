// This room is what stands between ReverseProxy and the client: which headers
// go up and down, and the writer that the provider's answer passes through. It
// swallows what must not reach a client (1xx, trailers, upgrades, the provider's
// key), and shows every byte to the meter on its way.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// goesUp is the allow-list for request headers. Keys are canonical.
func goesUp(name string) bool {
	switch name {
	case "Content-Type", "Accept", "User-Agent", "Idempotency-Key", "X-Client-Request-Id", "Traceparent", "Tracestate":
		return true
	case "Openai-Organization", "Openai-Project":
		return false // they name the account that pays: the upstream's settings say which
	}
	return strings.HasPrefix(name, "Openai-") || strings.HasPrefix(name, "X-Stainless-") || strings.HasPrefix(name, "Anthropic-")
}

// upHeader returns the headers that go to the provider, the key not yet among
// them. Those that the client's Connection header names are for this hop only;
// Content-Type is not the client's to take away.
func upHeader(in http.Header) http.Header {
	out := make(http.Header, 8)
	for name, values := range in {
		if goesUp(name) {
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

// comesDown is the allow-list for answer headers. Keys are canonical. The
// provider's X-Ratelimit-* are not on it: they are the key's, which many tokens
// share; the token's own stand in their place (admit.go).
func comesDown(name string) bool {
	switch name {
	case "Content-Type", "Content-Length", "Content-Encoding", "Content-Disposition",
		"X-Request-Id", "Request-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry":
		return true
	case "Openai-Organization", "Openai-Project", "Anthropic-Organization-Id":
		return false // whose account it is
	}
	return strings.HasPrefix(name, "Openai-") || strings.HasPrefix(name, "Anthropic-")
}

// An answerWriter is the http.ResponseWriter that ReverseProxy writes to. Its
// header map leads nowhere: nothing reaches the client that expect did not put
// there, so no 1xx and no trailer does. It has no Hijack and no Unwrap.
type answerWriter struct {
	s      *server
	c      *call
	w      http.ResponseWriter
	header http.Header

	meter      *meter // nil until an answer came
	keys       keyMask
	sse        bool
	providerID string // what the provider calls this request
	status     int
	gone       bool // the client did not take them
}

func newAnswerWriter(s *server, c *call, w http.ResponseWriter) *answerWriter {
	return &answerWriter{s: s, c: c, w: w, header: http.Header{}}
}

func (a *answerWriter) Header() http.Header { return a.header }

// expect takes over the head of the provider's answer: what may come down goes
// into the client's header.
func (a *answerWriter) expect(res *http.Response) {
	a.keys = newKeyMask(a.c.upstream.key())
	kind, contentType := a.c.endpoint.meter, mediaType(res.Header.Get("Content-Type"))
	encoded := res.Header.Get("Content-Encoding")
	opaque := encoded != "" && encoded != "identity"
	if a.sse = contentType == "text/event-stream"; a.sse {
		a.s.metrics.streams.Add(1) // until settle
	}
	if res.StatusCode >= 400 || !a.sse && contentType != "application/json" && !opaque {
		kind = meterNone // an error is not billed; audio and the like say nothing
	}
	a.meter = newMeter(kind, a.sse, opaque, a.c.stripped)

	to := a.w.Header()
	for name, values := range res.Header {
		if comesDown(name) && !a.keys.in(values) {
			to[name] = values
			if name == "X-Request-Id" || name == "Request-Id" {
				a.providerID = clip(values[0], 128)
			}
		}
	}
	if _, ok := to["Content-Type"]; !ok {
		to["Content-Type"] = nil // net/http would guess one from the body
	}
	if a.c.stripped && a.sse {
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
func (a *answerWriter) WriteHeader(status int) {
	if status < 200 || a.status != 0 {
		return
	}
	a.status = status
	a.c.firstByte = time.Since(a.c.start)
	a.w.WriteHeader(status)
}

// Write passes bytes of the answer on. It reports them all as written even
// where an event is held back, so that ReverseProxy goes on.
func (a *answerWriter) Write(p []byte) (int, error) {
	rest := a.meter.pass(a.keys.pass(p))
	a.c.watch.answered.Add(int64(len(p)))
	if a.sse {
		a.c.watch.output.Store(max(a.meter.counts.output, a.meter.estimateOutput()))
	}
	if err := a.send(rest); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (a *answerWriter) send(p []byte) error {
	if len(p) == 0 {
		a.s.running.enter(a.c, phaseRelaying)
		return nil
	}
	a.c.kept.answered(p)
	a.s.running.enter(a.c, phaseWriting)
	if _, err := a.w.Write(p); err != nil {
		a.gone = true
		return err
	}
	a.s.running.enter(a.c, phaseRelaying)
	return nil
}

// FlushError lets ReverseProxy push each event out at once.
func (a *answerWriter) FlushError() error {
	if a.status == 0 {
		return nil
	}
	a.s.running.enter(a.c, phaseWriting)
	err := a.c.controller.Flush()
	if err != nil {
		a.gone = true
	}
	a.s.running.enter(a.c, phaseRelaying)
	return err
}

// finish sends what is still held when the answer is complete.
func (a *answerWriter) finish() {
	if a.status == 0 {
		return
	}
	if rest := a.keys.end(); len(rest) > 0 {
		_ = a.send(a.meter.pass(rest))
	}
	_ = a.send(a.meter.end())
}

// A keyMask replaces a provider key in an answer by asterisks, also where it is
// cut in two by the network: no answer may carry the key to a client, whatever
// a provider echoes.
type keyMask struct {
	key  []byte
	rare int    // the index of a byte of the key that answers seldom have: the search goes by it
	held []byte // the end of what came, if a key may begin there
	out  []byte // what pass returned last, when it had to join
	seen bool   // a key was found
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

// in reports whether a header's values hold the key.
func (m *keyMask) in(values []string) bool {
	for _, v := range values {
		if strings.Contains(v, string(m.key)) {
			m.seen = true
			return true
		}
	}
	return false
}

// pass returns what of p, and of what was held, can go on. It may write to p.
func (m *keyMask) pass(p []byte) []byte {
	if len(m.key) == 0 {
		return p
	}
	if len(m.held) > 0 {
		m.out = append(append(m.out[:0], m.held...), p...)
		m.held, p = m.held[:0], m.out
	}
	at := 0 // what is before it has been looked at
	for i := m.find(p, at); i >= 0; i = m.find(p, at) {
		m.seen = true
		at = i + len(m.key)
		copy(p[i:at], bytes.Repeat([]byte{'*'}, len(m.key)))
	}
	tail := p[max(at, len(p)-len(m.key)+1):]
	for i := bytes.IndexByte(tail, m.key[0]); i >= 0; {
		if bytes.HasPrefix(m.key, tail[i:]) {
			m.held = append(m.held, tail[i:]...)
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

// end returns what was held and turned out not to be a key.
func (m *keyMask) end() []byte { return m.held }

// maxModelList bounds the one answer that is read whole.
const maxModelList = 8 << 20

// filterModels takes out of a list of models what the token may not use. This
// is the one answer that is changed; without a list of models in a policy even
// it is not.
func filterModels(c *call, res *http.Response) error {
	project, token := &c.project.policy, &c.state.policy
	if project.Models == nil && token.Models == nil || c.tries.union != nil { // which is within them as it is
		return nil
	}
	unreadable := errUnreadableList()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxModelList+1))
	if err != nil || len(body) > maxModelList {
		unreadable.cause = errors.Join(err, errors.New("reading the list of models"))
		return unreadable
	}
	var list map[string]json.RawMessage
	var data []json.RawMessage
	if json.Unmarshal(body, &list) != nil || json.Unmarshal(list["data"], &data) != nil {
		return unreadable
	}
	kept := []json.RawMessage{}
	for _, raw := range data {
		var m struct {
			ID string `json:"id"`
		}
		if json.Unmarshal(raw, &m) == nil && project.allowsModel(m.ID) && token.allowsModel(m.ID) {
			kept = append(kept, raw)
		}
	}
	if list["data"], err = json.Marshal(kept); err != nil {
		return unreadable
	}
	delete(list, "first_id") // Anthropic's cursors: they name models
	delete(list, "last_id")
	if body, err = json.Marshal(list); err != nil {
		return unreadable
	}
	res.Body.Close()
	res.Body, res.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	res.Header.Set("Content-Length", strconv.Itoa(len(body)))
	return nil
}

func errUnreadableList() *apiError {
	return &apiError{status: http.StatusBadGateway, code: "upstream_protocol_error", msg: "The provider's list of models could not be read."}
}
