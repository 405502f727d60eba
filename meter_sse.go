// This file cuts a text/event-stream into events, for the meter and for every check of a stream, and meters
// the events. If the meter has to leave one out, each event is held back until it is complete. At most 64 KiB
// of an event are kept; a larger event passes at once and is read as it passes.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
)

const maxEventBytes = 64 << 10 // bytes of an event that are kept; a usage chunk has a few hundred

// An sseToken is what sseCutter.next has found.
type sseToken uint8

const (
	sseMore sseToken = iota // all bytes are read: feed more
	sseData                 // a piece of the event's data, in text
	sseJoin                 // the event has another line of data: a line feed joins it to the one before
	sseEnd                  // the empty line that ends the event
	sseTail                 // the LF of a CRLF whose CR has ended the event
)

// An sseCutter cuts a text/event-stream into events and their data. The same bytes give the same events,
// whatever pieces they come in. It allocates nothing and keeps nothing of the stream but the event's name and
// the beginning of a field's name. The zero value is ready. Use:
//
//	cutter.feed(piece)
//	for token := cutter.next(); token != sseMore; token = cutter.next() { … }
type sseCutter struct {
	text []byte // of sseData: a part of the current piece
	pos  int    // the tokens returned so far cover the current piece up to here

	// The current event. The fields are complete at sseEnd and stay until the next call.
	open    bool     // it has bytes
	hasData bool     // it has a line of data
	lines   bool     // it has several lines of data
	name    [64]byte // of its `event:` line, clipped
	nameLen int
	first   bool // it is the stream's first event, so a byte order mark is skipped
	started bool // the first event has begun

	// The current line. A line ends with LF, CRLF or CR.
	midLine   bool // it has bytes
	afterCR   bool // the line before ended with CR: an LF that follows is part of that end
	field     lineField
	prefix    [6]byte // the name of its field so far
	prefixLen int

	piece []byte
	ends  lineEnds
}

// A lineField is the field that the current line has, as far as it has been read.
type lineField uint8

const (
	fieldStart     lineField = iota // the name is not complete
	fieldDataSpace                  // after `data:`; one space may follow
	fieldData
	fieldEventSpace // the same for `event:`
	fieldEvent
	fieldOther // a comment, id or retry; ignored to the end of the line
)

// feed gives the cutter the next bytes of the stream. next must have returned sseMore before.
func (c *sseCutter) feed(p []byte) { c.piece, c.pos, c.ends = p, 0, lineEnds{lf: -1, cr: -1} }

// next returns the next token.
func (c *sseCutter) next() sseToken {
	for c.pos < len(c.piece) {
		if c.afterCR {
			c.afterCR = false
			if c.piece[c.pos] == '\n' {
				if c.pos++; !c.open {
					return sseTail
				}
				continue
			}
		}
		if !c.open {
			c.open, c.first, c.started = true, !c.started, true
			c.hasData, c.lines, c.nameLen = false, false, 0
		}
		end := c.ends.next(c.piece, c.pos)
		if end > c.pos {
			if token := c.readLine(c.piece[c.pos:end]); token != sseMore {
				return token
			}
			continue
		}
		empty := !c.midLine
		c.midLine, c.field, c.prefixLen, c.afterCR = false, fieldStart, 0, c.piece[end] == '\r'
		if c.pos++; empty {
			c.open = false
			return sseEnd
		}
	}
	c.piece, c.text = nil, nil // they are the caller's
	return sseMore
}

// readLine reads some or all of p, which is what there is of the rest of the current line. It returns sseMore if
// that gives no token.
func (c *sseCutter) readLine(p []byte) sseToken {
	c.midLine = true
	if c.field == fieldStart {
		c.pos += c.readFieldName(p)
		switch {
		case c.field != fieldDataSpace:
			return sseMore
		case c.hasData:
			c.lines = true
			return sseJoin
		}
		c.hasData = true
		return sseMore
	}
	c.pos += len(p)
	if c.field == fieldDataSpace || c.field == fieldEventSpace {
		c.field++
		if p[0] == ' ' {
			p = p[1:]
		}
	}
	switch {
	case c.field == fieldEvent:
		c.nameLen += copy(c.name[c.nameLen:], p)
	case c.field == fieldData && len(p) > 0:
		c.text = p
		return sseData
	}
	return sseMore
}

// readFieldName reads the name of a field up to its colon and returns how many bytes of p it has read: all if
// the line has no colon so far, or has another field.
func (c *sseCutter) readFieldName(p []byte) int {
	if c.prefixLen == 0 { // nearly always
		if bytes.HasPrefix(p, []byte("data:")) {
			c.field = fieldDataSpace
			return 5
		}
		if bytes.HasPrefix(p, []byte("event:")) {
			c.field, c.nameLen = fieldEventSpace, 0
			return 6
		}
	}
	for i, b := range p {
		c.prefix[c.prefixLen] = b
		c.prefixLen++
		switch name := string(c.prefix[:c.prefixLen]); {
		case name == "data:":
			c.field = fieldDataSpace
			return i + 1
		case name == "event:":
			c.field, c.nameLen = fieldEventSpace, 0
			return i + 1
		case c.first && name == "\uFEFF":
			c.prefixLen = 0
		case !startsWith("data:", name) && !startsWith("event:", name) && !(c.first && startsWith("\uFEFF", name)):
			c.field = fieldOther
			return len(p)
		}
	}
	return len(p)
}

func startsWith(s, prefix string) bool { return len(s) >= len(prefix) && s[:len(prefix)] == prefix }

// eventName returns the name in the current event's `event:` line, nil if it has none.
func (c *sseCutter) eventName() []byte { return c.name[:c.nameLen] }

// lineEnds finds the ends of lines in one slice, from left to right, and searches every byte once.
type lineEnds struct{ lf, cr int }

// next returns the index of the first CR or LF in p[i:], or len(p).
func (l *lineEnds) next(p []byte, i int) int {
	if l.lf < i {
		l.lf = indexFrom(p, i, '\n')
	}
	if l.cr < i {
		l.cr = indexFrom(p, i, '\r')
	}
	return min(l.lf, l.cr)
}

// indexFrom returns the index of the first c in p[i:], or len(p).
func indexFrom(p []byte, i int, c byte) int {
	if n := bytes.IndexByte(p[i:], c); n >= 0 {
		return i + n
	}
	return len(p)
}

// An sseEvents collects the data of each event of a stream, for checks that need an event as a whole.
type sseEvents struct {
	sseCutter
	data []byte // of the current event so far
}

// nextData returns the data of the next complete event that has any. The data is valid until the next call.
func (e *sseEvents) nextData() (data []byte, ok bool) {
	for {
		switch e.next() {
		case sseData:
			e.data = append(e.data, e.text...)
		case sseJoin:
			e.data = append(e.data, '\n')
		case sseEnd:
			if data, e.data = e.data, e.data[:0]; e.hasData {
				return data, true
			}
		case sseMore:
			return nil, false
		}
	}
}

// An eventType is what the name of an event means here.
type eventType uint8

const (
	eventNone           eventType = iota // no name
	eventOther                           // a name of no interest
	eventMessageStart                    // Anthropic's first: usage without the output
	eventError                           // the stream broke after its status 200
	eventEnd                             // the last event
	eventResponseEnd                     // the last event, with the usage in `response`
	eventResponseFailed                  // the same, and the answer is an error
	eventItemDone                        // an item of a response is complete
)

// itemDone is the name of the event with a complete item of a response.
const itemDone = "response.output_item.done"

func eventTypeOf(name []byte) eventType {
	switch string(name) {
	case "":
		return eventNone
	case "message_start":
		return eventMessageStart
	case "error":
		return eventError
	case "message_stop", "transcript.text.done", "speech.audio.done",
		"image_generation.completed", "image_edit.completed":
		return eventEnd
	case "response.completed", "response.incomplete", "response.done", "response.cancelled",
		"interaction.completed", "interaction.complete":
		return eventResponseEnd
	case "response.failed":
		return eventResponseFailed
	case itemDone:
		return eventItemDone
	}
	return eventOther
}

// An eventReader is the part of a meter that reads the events of a stream. The zero value is ready.
type eventReader struct {
	cutter sseCutter
	buffer []byte // the current event so far, if it comes in pieces
	out    []byte // the result of process, if that is not a part of its argument

	oversized bool    // the current event is larger than maxEventBytes
	dropped   bool    // the last event was left out
	parsing   bool    // the current event's data goes to the JSON scanner
	walking   bool    // and to the text counter
	data      []byte  // the last piece of its data, in the argument of process
	head      [6]byte // the first bytes of its data
	headLen   int

	deltas int64 // complete events that may carry a piece of the answer
}

// lacksEndMarker reports whether the answer is a stream of events of which the last has not come.
func (m *meter) lacksEndMarker() bool {
	return !m.done && (m.format == formatSSE || m.format == formatUnknown && m.declaredSSE)
}

const maxSpareBytes = 64 << 10 // of a buffer that is used again

// renew returns an empty reader, which is e itself unless that is nil.
func (e *eventReader) renew() *eventReader {
	if e == nil || cap(e.buffer)+cap(e.out) > maxSpareBytes {
		return &eventReader{}
	}
	*e = eventReader{buffer: e.buffer[:0], out: e.out[:0]}
	return e
}

// processEvents is process for a stream.
func (m *meter) processEvents(p []byte) []byte {
	e := m.reader
	out := e.out[:0]
	from := 0  // p[from:start] goes out as it is
	start := 0 // where the current event starts in p
	e.cutter.feed(p)
	for token := e.cutter.next(); token != sseMore; token = e.cutter.next() {
		switch token {
		case sseData:
			e.data = e.cutter.text
			m.readData(e.data)
		case sseJoin:
			m.readData([]byte{'\n'})
		case sseTail: // part of the event before: passed on or left out with it
			if start = e.cutter.pos; e.dropped {
				out = append(out, p[from:start-1]...)
				from = start
			}
		case sseEnd:
			end := e.cutter.pos
			event := p[start:end]
			if len(e.buffer) > 0 {
				e.buffer = append(e.buffer, event...)
				event, e.data = e.buffer, nil
			}
			e.dropped = m.finishEvent(event, true) && m.strip
			switch {
			case e.dropped:
				out = append(out, p[from:start]...)
				from = end
			case len(e.buffer) > 0:
				if m.strip {
					out = append(out, e.buffer...)
				}
				from = end
			}
			e.buffer, start = e.buffer[:0], end
		}
	}
	to := len(p)
	if rest := p[start:]; len(rest) > 0 && !e.oversized {
		kept := m.bufferEvent(rest)
		if !e.oversized {
			to = start
		}
		if m.strip {
			out = append(out, kept...)
		}
	}
	if !m.strip {
		return p
	}
	if len(out) == 0 {
		return p[from:to]
	}
	e.out = append(out, p[from:to]...)
	return e.out
}

// bufferEvent keeps the last bytes of a piece, in which the current event does not end. If the event is now
// too large, bufferEvent returns what was kept of it, and the rest is read as it passes.
func (m *meter) bufferEvent(rest []byte) []byte {
	e := m.reader
	if len(e.buffer)+len(rest) <= maxEventBytes {
		e.buffer = append(e.buffer, rest...)
		return nil
	}
	m.walkData(e.buffer, rest)
	kept := e.buffer
	e.buffer, e.oversized = nil, true
	return kept
}

// finishEvents is finish for a stream. It reads a last event without its empty line like any other, as a client
// may.
func (m *meter) finishEvents() []byte {
	e := m.reader
	if !e.cutter.open {
		return nil
	}
	kept := e.buffer
	e.data = nil
	e.dropped = m.finishEvent(kept, false) && m.strip
	e.buffer, e.cutter.open = nil, false
	if e.dropped || !m.strip {
		return nil
	}
	return kept
}

// finishEvent reads an event that has ended and reports whether it is a usage chunk that may be left out. Of an
// oversized one, everything has been read already. complete means that its empty line was seen.
func (m *meter) finishEvent(event []byte, complete bool) bool {
	e := m.reader
	large := e.oversized || len(event) > maxEventBytes
	switch {
	case e.oversized:
	case large:
		m.walkData(event)
	case !e.cutter.hasData || e.isDoneMark():
	case e.cutter.lines: // the document is cut into lines, anywhere
		m.walkData(event)
	case m.readMembers(e.singleLine(event)):
		m.scanData(event)
	}
	failed := m.failed
	usageChunk := e.cutter.hasData && m.applyEvent(complete) && !large
	if m.failed && !failed {
		m.errorEvent, m.textOnly = eventData(event), false
	}
	e.oversized, e.parsing, e.walking, e.headLen = false, false, false, 0
	return usageChunk
}

// isDoneMark reports whether the current event is the end mark of OpenAI's streams.
func (e *eventReader) isDoneMark() bool { return string(e.head[:e.headLen]) == "[DONE]" }

// singleLine returns the data of an event that has ended and has one line of it.
func (e *eventReader) singleLine(event []byte) []byte {
	if e.data == nil { // it came in pieces, or is empty
		again := sseCutter{started: !e.cutter.first}
		again.feed(event)
		for token := again.next(); token != sseMore; token = again.next() {
			if token == sseData {
				return again.text
			}
		}
	}
	return e.data
}

// walkData is scanData, and passes the data to the text counter, too.
func (m *meter) walkData(parts ...[]byte) {
	m.reader.walking = m.countsText()
	m.scanData(parts...)
}

// scanData passes the data of the current event to the JSON scanner from its first byte: parts are the event so
// far. readData passes on what comes later.
func (m *meter) scanData(parts ...[]byte) {
	m.reader.parsing, m.textOnly = true, false
	m.scan.reset(true)
	again := sseCutter{started: !m.reader.cutter.first}
	for _, part := range parts {
		again.feed(part)
		for token := again.next(); token != sseMore; token = again.next() {
			switch token {
			case sseData:
				m.parseData(again.text)
			case sseJoin:
				m.parseData([]byte{'\n'})
			}
		}
	}
}

// parseData reads a piece of the data of an event that is parsed.
func (m *meter) parseData(p []byte) {
	m.scan.feedAll(p)
	if m.reader.walking {
		m.text.feed(p)
	}
}

// readData reads a piece of the current event's data.
func (m *meter) readData(p []byte) {
	e := m.reader
	if e.headLen < len(e.head) {
		e.headLen += copy(e.head[e.headLen:], p)
	}
	if e.parsing {
		m.parseData(p)
	}
}

// readMembers reads an event's data by the names before its colons. It counts the text, and reports whether
// applyEvent could find something else in the data: true for some events without anything of interest, but never
// false for one with it. Most events only carry a word of the answer, so this pass is what a stream costs.
func (m *meter) readMembers(data []byte) (relevant bool) {
	name := m.reader.cutter.eventName() // the event's `event:` line gives the type, and marks errors
	untyped := len(name) == 0 || string(name) == "message"
	counts := m.countsText() && isDeltaName(name)
	relevant = m.kind == meterGemini || string(name) == itemDone // each event of Gemini's has usage
	for i := 0; ; i++ {
		if i = indexFrom(data, i, ':'); i == len(data) {
			return relevant
		}
		end := i
		for end > 0 && data[end-1] <= ' ' {
			end--
		}
		if end < 6 || data[end-1] != '"' { // too short for a name of four letters in quotes
			continue
		}
		switch string(data[end-5 : end-1]) {
		case "sage", "rror", "rors", "resp", "tail", "\"msg", "_msg": // usage, message, error and such
			rest := bytes.TrimLeft(data[i+1:], " ")
			relevant = relevant || len(rest) == 0 || rest[0] != 'n' // not null
		case "ject", "ason", "cess": // object, finish_reason, success
			c, rest := valueStart(data, i)
			relevant = relevant || c == 'f' || c == '"' && bytes.HasPrefix(rest, []byte(`"error"`))
		case "ices": // choices
			c, rest := valueStart(data, i)
			relevant = relevant || c == '[' && len(rest) > 1 && rest[1] == ']'
		case "odel":
			relevant = relevant || m.model == ""
		case "type":
			relevant = relevant || untyped
		case "atus": // status
			relevant = relevant || eventTypeOf(name) == eventResponseEnd
		case "tent", "ents", "json", "nput", "elta", "usal", "ript", "alue", "text", "ning", "king":
			if counts {
				i = m.text.readMember(data, end-1, i)
			}
		}
		if relevant && !counts {
			return true
		}
	}
}

// valueStart returns the first byte of the value after the colon at data[colon], 0 if there is none, and the data
// from it on.
func valueStart(data []byte, colon int) (byte, []byte) {
	for i := colon + 1; i < len(data); i++ {
		if data[i] != ' ' {
			return data[i], data[i:]
		}
	}
	return 0, nil
}

// isDeltaName reports whether an event with this name may carry a piece of the answer. Other named events repeat
// the answer, or start and end its parts.
func isDeltaName(name []byte) bool { return len(name) == 0 || bytes.Contains(name, []byte("delta")) }

// applyEvent updates the meter after an event with data and reports whether the event is a usage chunk.
func (m *meter) applyEvent(complete bool) bool {
	e, s := m.reader, &m.scan
	m.events++
	name := e.cutter.eventName()
	doneMark := e.isDoneMark()
	m.done = m.done || doneMark
	kind := eventTypeOf(name)
	isError := kind == eventError
	if e.parsing {
		if s.eventType != eventNone {
			kind = s.eventType
		}
		isError = isError || s.saysError()
		m.model = s.model
		m.done = m.done || s.finished
	}
	m.failed = m.failed || isError
	if !doneMark && !isError && complete && isDeltaName(name) && !(e.parsing && s.choicesEmpty) {
		if e.deltas++; !e.parsing || len(name) > 0 || !s.typeSeen || s.typeIsDelta {
			m.textBytes += m.text.sum()
		}
	}
	m.text = textCounter{}
	switch kind {
	case eventItemDone:
		if s.tools != (toolCounts{}) { // the item has come whole
			m.doneTools.add(&s.item)
		}
	case eventEnd, eventResponseEnd, eventResponseFailed:
		m.done = true
		m.failed = m.failed || kind == eventResponseFailed || e.parsing && s.statusFailed
	}
	if !e.parsing || !s.usageSeen {
		return false
	}
	m.applyUsage(kind)
	return s.state == scanClosed && s.choicesEmpty && !s.usageNested && !s.usageInner
}

// applyUsage updates the usage from an event of this type.
func (m *meter) applyUsage(kind eventType) {
	nested := m.scan.usageNested
	if m.scan.tools != (toolCounts{}) {
		m.tools = m.scan.tools
	}
	switch {
	case nested && m.kind == meterAnthropic && kind == eventMessageStart:
		m.scan.usage.n[slotOutput] = countInvalid // it is 1; the true count comes with message_delta
		m.hasUsage, m.usage = true, m.scan.usage
	case nested && (m.kind == meterAnthropic || kind != eventResponseEnd && kind != eventResponseFailed):
		// an event in the middle of the stream: its counts are not final
	case m.hasUsage:
		m.usage.merge(&m.scan.usage)
	default:
		m.hasUsage, m.usage = true, m.scan.usage
	}
}

// eventData returns a copy of the data of an event.
func eventData(event []byte) []byte {
	var events sseEvents
	events.feed(append(bytes.Clone(event), "\n\n"...)) // its end may be missing
	data, _ := events.nextData()
	return data
}

// A streamEvent is what one event shows about its stream.
type streamEvent struct {
	isIdle   bool // the event is no part of an answer: a ping or a heartbeat
	isBroken bool // the event is a part of JSON
	isError  bool // the answer failed
	finished bool // the event has a finish reason
}

// parseStreamEvent reads an event's name and data. What is not even the beginning of a JSON object is a heartbeat,
// which some gateways send as data.
func parseStreamEvent(name, data []byte) (e streamEvent) {
	data = bytes.TrimSpace(data)
	if string(name) == "error" {
		return streamEvent{isError: true}
	}
	if len(data) == 0 || data[0] != '{' && data[0] != '[' || string(data) == "{}" || isHeartbeat(string(name)) {
		return streamEvent{isIdle: true}
	}
	var v struct {
		Type    any
		Usage   json.RawMessage
		Choices []struct {
			FinishReason any `json:"finish_reason"`
		}
		Candidates []struct {
			FinishReason any `json:"finishReason"`
		}
	}
	if _, ok := errors.AsType[*json.SyntaxError](json.Unmarshal(data, &v)); ok { // other types do not matter
		return streamEvent{isBroken: data[0] == '{', isIdle: data[0] != '{'}
	}
	if kind, ok := v.Type.(string); ok && isHeartbeat(kind) {
		return streamEvent{isIdle: true}
	}
	e.isIdle = v.Choices != nil && len(v.Choices) == 0 && len(v.Usage) == 0
	if e.isError = v.Type == "response.failed" || saysError(data); e.isError {
		e.isIdle = false
	}
	for _, c := range v.Choices {
		e.finished = e.finished || c.FinishReason != nil
	}
	for _, c := range v.Candidates {
		e.finished = e.finished || c.FinishReason != nil
	}
	return e
}

// isHeartbeat reports whether events of this name or type only keep the connection open.
func isHeartbeat(kind string) bool {
	switch strings.ToLower(kind) {
	case "ping", "heartbeat", "keepalive", "keep-alive", "keep_alive":
		return true
	}
	return false
}

// A streamCheck checks the events of a buffered stream as they come.
type streamCheck struct {
	events   sseEvents
	started  bool  // an event of the answer has come
	finished bool  // an event had a finish reason
	fault    fault // the first event is an error
}

// problem reads the next bytes and returns what is wrong with the stream, "" if nothing is. An error as the first
// event is no problem of the stream but an answer: see fault. Later, an error that another upstream would not
// give either is a part of the answer.
func (s *streamCheck) problem(p []byte) string {
	s.events.feed(p)
	for data, ok := s.events.nextData(); ok; data, ok = s.events.nextData() {
		e := parseStreamEvent(s.events.eventName(), data)
		switch {
		case e.isIdle:
			continue
		case e.isBroken:
			return notJSON
		case e.isError:
			f := judgeEmbedded(data, 0)
			if !s.started {
				s.fault = f
			} else if f.kind != faultRequest && f.kind != faultTooLong {
				return errorInStream
			}
		}
		s.started = true
		s.finished = s.finished || e.finished
	}
	return ""
}

// A streamError says why an answer cannot be used. None of it has reached the client.
type streamError struct{ problem string }

func (e *streamError) Error() string { return "the provider " + e.problem }

const (
	errorInStream = "sent an error in the stream"
	noAnswer      = "sent an empty answer"
	noFirstEvent  = "ended the stream before its first event"
	notJSON       = "sent an event that is not JSON"
	unfinished    = "ended its answer in the middle"
	htmlPage      = "sent a page instead of an answer"
)
