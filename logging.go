// This file writes the log without ever delaying a call: lines are collected in memory, and
// one goroutine writes them. If the reader of the log is too slow, lines are dropped and
// counted. It may not decide what is logged. It also has the ids by which clients, log lines and
// the ledger name a call.
package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"
)

const maxLogBacklog = 1 << 20 // bytes waiting to be written

// A logSink is an io.Writer for slog's handlers. Each Write is one line.
type logSink struct {
	out io.Writer

	mu           sync.Mutex
	buf          []byte
	dropped      int64 // since the last warning about dropped lines
	droppedTotal int64 // since the start
	closed       bool

	wake chan struct{}
	done chan struct{}
}

func newLogSink(out io.Writer) *logSink {
	s := &logSink{out: out, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go s.run()
	return s
}

func (s *logSink) Write(line []byte) (int, error) {
	s.mu.Lock()
	if len(s.buf)+len(line) > maxLogBacklog || s.closed {
		s.dropped++
		s.droppedTotal++
	} else {
		s.buf = append(s.buf, line...)
	}
	s.mu.Unlock()
	s.wakeWriter()
	return len(line), nil
}

// droppedLines returns the number of dropped lines since the start.
func (s *logSink) droppedLines() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.droppedTotal
}

func (s *logSink) wakeWriter() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run writes the collected lines until close, which waits for it.
func (s *logSink) run() {
	defer close(s.done)
	var spare []byte
	for range s.wake {
		s.mu.Lock()
		lines, dropped, closed := s.buf, s.dropped, s.closed
		s.buf, s.dropped = spare[:0], 0
		s.mu.Unlock()
		_, err := s.out.Write(lines)
		if dropped > 0 && err == nil {
			const warning = `{"level":"WARN","msg":"log lines were dropped: their reader was too slow","lines":%d}`
			fmt.Fprintf(s.out, warning+"\n", dropped)
		}
		spare = lines
		if closed {
			return
		}
	}
}

// close writes the remaining lines. It waits at most a second, because a reader that has
// stopped must not keep the program from ending.
func (s *logSink) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.wakeWriter()
	select {
	case <-s.done:
	case <-time.After(time.Second):
	}
}

// A logger is slog's logger with a faster writer for the lines of calls.
type logger struct {
	*slog.Logger
	out      io.Writer
	text     bool // not JSON
	linePool sync.Pool
}

func newLogger(out io.Writer, level slog.Level, text bool) *logger {
	opts := &slog.HandlerOptions{Level: level}
	l := &logger{out: out, text: text}
	l.linePool.New = func() any { return &logLine{b: make([]byte, 0, 1<<10)} }
	if text {
		l.Logger = slog.New(slog.NewTextHandler(out, opts))
	} else {
		l.Logger = slog.New(slog.NewJSONHandler(out, opts))
	}
	return l
}

// A logLine is a line that is assembled field by field, in the format of slog's handlers. It
// is used for the line of each call: slog would spend 5 % of the cost of a call on it, three
// times as much as this does.
type logLine struct {
	logger *logger
	b      []byte
}

// beginLine starts a line. The caller must call end.
func (l *logger) beginLine(at time.Time, level slog.Level, msg string) *logLine {
	n := l.linePool.Get().(*logLine)
	n.logger = l
	if l.text {
		n.b = at.AppendFormat(append(n.b[:0], "time="...), "2006-01-02T15:04:05.000Z07:00")
	} else {
		n.b = append(at.AppendFormat(append(n.b[:0], `{"time":"`...), time.RFC3339Nano), '"')
	}
	n.str("level", level.String())
	n.str("msg", msg)
	return n
}

// end writes the line.
func (n *logLine) end() {
	if !n.logger.text {
		n.b = append(n.b, '}')
	}
	_, _ = n.logger.out.Write(append(n.b, '\n')) // the sink returns no error
	n.logger.linePool.Put(n)
}

// key writes the name of a field. The name must be one that needs no quotes.
func (n *logLine) key(name string) {
	if n.logger.text {
		n.b = append(append(append(n.b, ' '), name...), '=')
	} else {
		n.b = append(append(append(n.b, `,"`...), name...), `":`...)
	}
}

func (n *logLine) str(name, v string) {
	n.key(name)
	switch {
	case !n.logger.text:
		n.b = appendJSONString(n.b, v)
	case v == "" || strings.ContainsFunc(v, func(r rune) bool {
		return r == ' ' || r == '"' || r == '=' || r == utf8.RuneError || !unicode.IsPrint(r)
	}):
		n.b = strconv.AppendQuote(n.b, v)
	default:
		n.b = append(n.b, v...)
	}
}

func (n *logLine) num(name string, v int64) {
	n.key(name)
	n.b = strconv.AppendInt(n.b, v, 10)
}

func (n *logLine) flag(name string, v bool) {
	n.key(name)
	n.b = strconv.AppendBool(n.b, v)
}

// newHTTPErrorLog returns a logger for net/http's messages about single connections, such as
// failed handshakes and aborted copies. Clients influence the text, so it is clipped.
func newHTTPErrorLog(to *logger) *log.Logger {
	return log.New(httpErrorWriter{to}, "", 0)
}

type httpErrorWriter struct{ logger *logger }

func (w httpErrorWriter) Write(p []byte) (int, error) {
	if bytes.HasPrefix(p, []byte("http: panic serving ")) { // a bug; the stack has addresses, no values
		w.logger.Error("panic", "note", clip(string(p), 8192))
		return len(p), nil
	}
	w.logger.Debug("net/http", "note", clip(string(p), 512))
	return len(p), nil
}

// A traceContext identifies a span of a trace. Both ids are empty if there is none.
type traceContext struct{ traceID, spanID string }

// parseTraceparent reads a traceparent header: version, trace id, parent id and flags.
// Versions after 00 may have more at the end. A header that is malformed or repeated
// identifies no trace and must not be forwarded.
func parseTraceparent(values []string) (traceContext, bool) {
	if len(values) != 1 {
		return traceContext{}, false
	}
	v := values[0]
	if len(v) < 55 || len(v) > 256 || v[2] != '-' || v[35] != '-' || v[52] != '-' ||
		!isLowerHex(v[:2]) || !isLowerHex(v[53:55]) || v[:2] == "ff" {
		return traceContext{}, false
	}
	if len(v) > 55 && (v[:2] == "00" || v[55] != '-') {
		return traceContext{}, false
	}
	t := traceContext{v[3:35], v[36:52]}
	if !isLowerHex(t.traceID) || !isLowerHex(t.spanID) ||
		strings.Trim(t.traceID, "0") == "" || strings.Trim(t.spanID, "0") == "" {
		return traceContext{}, false
	}
	return t, true
}

// isLowerHex reports whether s has only lower-case hexadecimal digits.
func isLowerHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

func checkOneOf(s string, allowed ...string) error {
	if slices.Contains(allowed, s) {
		return nil
	}
	return fmt.Errorf("must be one of: %s", strings.Join(allowed, ", "))
}

func parseLogFormat(s string) (isText bool, err error) {
	return s == "text", checkOneOf(s, "json", "text")
}

func parseLevel(s string) (slog.Level, error) {
	var l slog.Level
	if err := checkOneOf(s, "debug", "info", "warn", "error"); err != nil {
		return l, err
	}
	return l, l.UnmarshalText([]byte(s))
}

// Call ids.

// An idSource makes the ids of calls. An id has 42 bits of unix milliseconds, 10 bits with the slot of the replica, and
// an 11-bit counter. Ids always grow, even when the clock is set back. Replicas with different slots never make the
// same one.
type idSource struct {
	slot func() int64 // nil: 0, the slot of a process that has its database alone
	last atomic.Int64
}

const (
	idTimeShift  = 21
	idSlotShift  = 11
	replicaSlots = 1 << (idTimeShift - idSlotShift) // the number of slots
)

// newIDSource returns a source of ids above last, the highest id on record with this slot.
func newIDSource(last int64, slot func() int64) *idSource {
	s := &idSource{slot: slot}
	s.last.Store(last)
	return s
}

func (s *idSource) next(now time.Time) int64 {
	slot := int64(0)
	if s.slot != nil {
		slot = s.slot()
	}
	for {
		last, id := s.last.Load(), now.UnixMilli()<<idTimeShift|slot<<idSlotShift
		if id <= last {
			if id = last + 1; idSlot(id) != slot { // the counter overflowed, or last has another slot
				id = last>>idTimeShift<<idTimeShift | slot<<idSlotShift
			}
			if id <= last { // continue in the next millisecond
				id += 1 << idTimeShift
			}
		}
		if s.last.CompareAndSwap(last, id) {
			return id
		}
	}
}

// idSlot returns the slot of the replica that made the id.
func idSlot(id int64) int64 { return id >> idSlotShift & (replicaSlots - 1) }

// minIDAt returns the lowest id of a call that starts at t.
func minIDAt(t time.Time) int64 { return t.UnixMilli() << idTimeShift }

const crockford = "0123456789abcdefghjkmnpqrstvwxyz"

// formatRequestID writes a call's id as clients see it.
func formatRequestID(id int64) string {
	out := []byte("req_0000000000000")
	for i := len(out) - 1; i >= 4; i-- {
		out[i] = crockford[id&31]
		id >>= 5
	}
	return string(out)
}

// parseRequestID reads an id from formatRequestID, and returns 0 for any other text.
func parseRequestID(s string) int64 {
	digits, ok := strings.CutPrefix(s, "req_")
	if !ok || len(digits) != 13 || digits[0] > '7' {
		return 0
	}
	var id int64
	for _, r := range digits {
		i := strings.IndexRune(crockford, r)
		if i < 0 {
			return 0
		}
		id = id<<5 | int64(i)
	}
	return id
}

// maskKeyLike replaces what looks like a provider's key, or names the account behind it, by as many asterisks: the
// text of a 403 or 404 reaches the client, and may quote a part of the key. It writes to text.
func maskKeyLike(text []byte) {
	for from := 0; from < len(text); from++ {
		to := from
		for to < len(text) && isKeyByte(text[to]) {
			to++
		}
		if word := text[from:to]; looksLikeKey(string(word)) {
			copy(word, strings.Repeat("*", len(word)))
		}
		from = to
	}
}

func isKeyByte(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_' || c == '*'
}

// looksLikeKey reports whether a word begins like a key or an account's id, or is one of 32 letters and digits.
func looksLikeKey(word string) bool {
	const minLen = 8 // shorter words are no keys, such as sk-3
	for _, start := range [...]string{"sk-", "sk_", "pk-", "rk-", "gsk_", "xai-", "AIza", "hf_", "r8_", "nvapi-",
		"pplx-", "fw_", "tgp_", "csk-", "key-", "key_", "org-", "proj_"} {
		if strings.HasPrefix(word, start) && len(word) >= minLen {
			return true
		}
	}
	return len(word) >= 32 && !strings.ContainsAny(word, "-_*") && strings.ContainsAny(word, "0123456789")
}
