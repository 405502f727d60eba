// meter_sse.go cuts a text/event-stream into events, hands the data of those that can matter to the JSON
// reader, and holds an event back while it may turn out to be the one to leave out. It may keep 64 KiB of
// one event and no more; a larger one is handed on at once and read as it passes.
package main

import (
	"bytes"
)

const maxEventBytes = 64 << 10 // bytes of an event that are held; a usage chunk has a few hundred

// An eventType is a name that an event goes by, where it means something here.
type eventType uint8

const (
	eventNone           eventType = iota // no name
	eventOther                           // a name of no interest
	eventMessageStart                    // Anthropic's first: usage without the output
	eventError                           // the stream broke after its status 200
	eventEnd                             // nothing comes after it
	eventResponseEnd                     // the same, with the usage in `response`
	eventResponseFailed                  // the same, and the answer is an error
)

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
	case "response.completed", "response.incomplete":
		return eventResponseEnd
	case "response.failed":
		return eventResponseFailed
	}
	return eventOther
}

type lineField uint8

const (
	fieldStart lineField = iota // the name is not complete
	fieldSpace                  // after `data:`; one space may follow
	fieldData
	fieldEventSpace // the same for `event:`
	fieldEvent
	fieldOther // a comment, id, retry: runs to the end of the line
)

// eventReader is the part of a meter that knows about events and lines.
type eventReader struct {
	// Cutting. A line ends with LF, CRLF or CR; an event ends with an empty line.
	midLine   bool   // the line has bytes
	afterCR   bool   // the line ended with CR, so that an LF now is still part of its end
	hasBytes  bool   // the event has bytes
	oversized bool   // the event has passed maxEventBytes
	dropped   bool   // the last event was left out
	buffer    []byte // the event so far, when it came in pieces
	out       []byte // what pass returns when it is not a part of its argument

	// The event at hand.
	firstEvent bool // it is the stream's first: a byte order mark may come
	parsing    bool // its data goes to the JSON reader
	hasData    bool
	multiLine  bool // lines of data; one may end anywhere in the document
	field      lineField
	prefix     [6]byte // the name of the field so far
	prefixLen  int
	name       [64]byte // of `event:`; more than 64 bytes are of no interest
	nameLen    int
	head       [6]byte // the first bytes of the data
	headLen    int
	dataSize   int64 // of the data

	// What the estimate is made of: complete events that carry a piece of the answer.
	deltas, deltaBytes       int64
	smallest, secondSmallest int64 // the two smallest sizes
}

// processEvents is pass for a stream.
func (m *meter) processEvents(p []byte) []byte {
	e := m.reader
	ends := lineEnds{lf: -1, cr: -1}
	out := e.out[:0]
	from := 0  // p[from:start] goes out as it is
	start := 0 // where the event at hand starts in p
	for i := 0; i < len(p); {
		if e.afterCR {
			e.afterCR = false
			if p[i] == '\n' {
				i++
				if !e.hasBytes { // it belongs to the event before, and goes its way
					if start = i; e.dropped {
						out = append(out, p[from:i-1]...)
						from = i
					}
				}
				continue
			}
		}
		e.hasBytes = true
		if e.midLine || p[i] != '\n' && p[i] != '\r' {
			e.midLine = true
			if i = ends.next(p, i); i < len(p) {
				e.midLine, e.afterCR = false, p[i] == '\r'
				i++
			}
			continue
		}
		e.afterCR = p[i] == '\r'
		i++
		whole := p[start:i]
		if len(e.buffer) > 0 {
			e.buffer = append(e.buffer, whole...)
			whole = e.buffer
		}
		e.dropped = m.finishEvent(whole, true) && m.strip
		switch {
		case e.dropped:
			out = append(out, p[from:start]...)
			from = i
		case len(e.buffer) > 0:
			if m.strip {
				out = append(out, e.buffer...)
			}
			from = i
		}
		e.buffer, e.hasBytes, e.oversized = e.buffer[:0], false, false
		start = i
	}
	to := len(p)
	if rest := p[start:]; len(rest) > 0 {
		switch {
		case e.oversized:
			m.readLines(rest)
		case len(e.buffer)+len(rest) > maxEventBytes:
			m.startOversized()
			m.readLines(e.buffer)
			m.readLines(rest)
			if m.strip {
				out = append(out, e.buffer...)
			}
			e.buffer = nil
		default:
			e.buffer = append(e.buffer, rest...)
			to = start
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

// finishEvents is end for a stream. An event without its empty line is read like any other: a client may
// do the same.
func (m *meter) finishEvents() []byte {
	e := m.reader
	if !e.hasBytes {
		return nil
	}
	held := e.buffer
	e.dropped = m.finishEvent(held, false) && m.strip
	e.buffer, e.hasBytes, e.oversized = nil, false, false
	if e.dropped || !m.strip {
		return nil
	}
	return held
}

// finishEvent reads the event that has come to its end, or the last part of a big one, and reports whether
// it is a usage chunk. complete: its empty line was seen.
func (m *meter) finishEvent(b []byte, complete bool) bool {
	e := m.reader
	big := e.oversized || len(b) > maxEventBytes
	switch {
	case e.oversized:
		m.readLines(b)
	case big:
		m.startOversized()
		m.readLines(b)
	default:
		m.readLines(b)
		if m.isRelevant(b) {
			e.reset()
			e.parsing = true
			m.scan.reset(true)
			m.readLines(b)
		}
	}
	chunk := e.hasData && m.applyEvent(complete) && !big
	e.reset()
	e.firstEvent = false
	return chunk
}

// startOversized turns to reading the event at hand as it passes.
func (m *meter) startOversized() {
	m.reader.reset()
	m.reader.oversized, m.reader.parsing = true, true
	m.scan.reset(true)
}

// reset forgets the lines of the event at hand.
func (e *eventReader) reset() {
	e.field, e.prefixLen, e.nameLen, e.headLen, e.dataSize = fieldStart, 0, 0, 0, 0
	e.hasData, e.multiLine, e.parsing = false, false, false
}

// isRelevant reports whether the data of an event, whose lines were read, can change anything. Most events
// carry a word of the answer and nothing else, so this is what a stream costs. It may say yes in vain, but
// says no only where take would find nothing: no name before a colon is one that matters.
func (m *meter) isRelevant(b []byte) bool {
	e := m.reader
	if !e.hasData || string(e.head[:e.headLen]) == "[DONE]" {
		return false
	}
	if e.multiLine {
		return true
	}
	// With an event line the type is known from there, and errors are.
	name := e.name[:e.nameLen]
	untyped := len(name) == 0 || string(name) == "message"
	for i := 0; ; i++ {
		if i = indexFrom(b, i, ':'); i == len(b) {
			return false
		}
		end := i
		for end > 0 && b[end-1] <= ' ' {
			end--
		}
		if end < 7 || b[end-1] != '"' { // all names have their quote and four letters, after `data:`
			continue
		}
		var wanted bool
		switch string(b[end-5 : end-1]) {
		case "sage", "rror": // usage, error
			rest := bytes.TrimLeft(b[i+1:], " ")
			wanted = len(rest) == 0 || rest[0] != 'n'
		case "odel":
			wanted = m.model == ""
		case "type":
			wanted = untyped
		}
		if wanted {
			return true
		}
	}
}

// applyEvent draws the consequences of one event with data and reports whether it is a usage chunk.
func (m *meter) applyEvent(complete bool) bool {
	e, s := m.reader, &m.scan
	m.events++
	name := e.name[:e.nameLen]
	finish := string(e.head[:e.headLen]) == "[DONE]"
	m.done = m.done || finish
	typ := eventTypeOf(name)
	fault := typ == eventError
	if e.parsing {
		if s.eventType != eventNone {
			typ = s.eventType
		}
		fault = fault || s.hasError || typ == eventError
		m.model = s.model
	}
	m.failed = m.failed || fault
	// Named events that are no deltas repeat the answer or frame it.
	if !finish && !fault && complete && (len(name) == 0 || bytes.Contains(name, []byte("delta"))) {
		e.recordSize()
	}
	switch typ {
	case eventEnd, eventResponseEnd:
		m.done = true
	case eventResponseFailed:
		m.done, m.failed = true, true
	}
	if !e.parsing || !s.usageSeen {
		return false
	}
	switch {
	case s.usageNested && m.kind == meterAnthropic && typ == eventMessageStart:
		s.usage.n[slotOutput] = countInvalid // it says 1; the true count comes with message_delta
		m.hasUsage, m.usage = true, s.usage
	case s.usageNested && m.kind == meterOpenAI && (typ == eventResponseEnd || typ == eventResponseFailed):
		m.adoptUsage()
	case s.usageNested: // of an event in between
	case m.kind == meterAnthropic && m.hasUsage:
		m.usage.merge(&s.usage)
	default:
		m.adoptUsage()
	}
	return s.state == scanClosed && s.choicesEmpty && !s.usageNested
}

// recordSize adds the event to what the estimate is made of.
func (e *eventReader) recordSize() {
	e.deltas++
	e.deltaBytes += e.dataSize
	switch {
	case e.deltas == 1:
		e.smallest, e.secondSmallest = e.dataSize, e.dataSize
	case e.dataSize < e.smallest:
		e.smallest, e.secondSmallest = e.dataSize, e.smallest
	case e.deltas == 2 || e.dataSize < e.secondSmallest:
		e.secondSmallest = e.dataSize
	}
}

// adoptUsage takes the usage just read for the answer's: the last one wins, but not over a better one.
func (m *meter) adoptUsage() {
	if !m.hasUsage || m.scan.usage.hasCounts() {
		m.hasUsage, m.usage = true, m.scan.usage
	}
}

// lineEnds finds the ends of lines in one slice from left to right, looking at every byte once.
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

func indexFrom(p []byte, i int, c byte) int {
	if n := bytes.IndexByte(p[i:], c); n >= 0 {
		return i + n
	}
	return len(p)
}

// readLines reads the next bytes of the event at hand, in any pieces.
func (m *meter) readLines(b []byte) {
	e := m.reader
	ends := lineEnds{lf: -1, cr: -1}
	for i := 0; i < len(b); i++ {
		end := ends.next(b, i)
		if end > i {
			m.readLine(b[i:end])
		}
		if end < len(b) { // the LF of a CRLF ends an empty line here, which does no harm
			e.field, e.prefixLen = fieldStart, 0
		}
		i = end
	}
}

// readLine reads a part of a line.
func (m *meter) readLine(b []byte) {
	e := m.reader
	if e.field == fieldStart {
		if b = e.readFieldName(b); e.field == fieldSpace {
			if e.hasData { // data lines are joined by a line feed
				e.multiLine = true
				m.readData([]byte{'\n'})
			}
			e.hasData = true
		}
	}
	if len(b) == 0 {
		return
	}
	if e.field == fieldSpace || e.field == fieldEventSpace {
		e.field++
		if b[0] == ' ' {
			b = b[1:]
		}
	}
	switch e.field {
	case fieldData:
		m.readData(b)
	case fieldEvent:
		e.nameLen += copy(e.name[e.nameLen:], b)
	}
}

// readFieldName reads the name of a field up to its colon and returns what follows.
func (e *eventReader) readFieldName(b []byte) []byte {
	if e.prefixLen == 0 { // nearly always
		if bytes.HasPrefix(b, []byte("data:")) {
			e.field = fieldSpace
			return b[5:]
		}
		if bytes.HasPrefix(b, []byte("event:")) {
			e.field, e.nameLen = fieldEventSpace, 0
			return b[6:]
		}
	}
	for i, c := range b {
		e.prefix[e.prefixLen] = c
		e.prefixLen++
		switch name := string(e.prefix[:e.prefixLen]); {
		case name == "data:":
			e.field = fieldSpace
			return b[i+1:]
		case name == "event:":
			e.field, e.nameLen = fieldEventSpace, 0
			return b[i+1:]
		case e.firstEvent && name == "\uFEFF":
			e.prefixLen = 0
		case !startsWith("data:", name) && !startsWith("event:", name) && !(e.firstEvent && startsWith("\uFEFF", name)):
			e.field = fieldOther
			return nil
		}
	}
	return nil
}

func startsWith(s, prefix string) bool { return len(s) >= len(prefix) && s[:len(prefix)] == prefix }

// readData reads a part of the event's data.
func (m *meter) readData(b []byte) {
	e := m.reader
	e.dataSize += int64(len(b))
	e.headLen += copy(e.head[e.headLen:], b)
	if e.parsing {
		m.scan.feed(b)
	}
}
