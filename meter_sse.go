// meter_sse.go cuts a text/event-stream into events, hands the data of those that can matter to the JSON
// reader, and holds an event back while it may turn out to be the one to leave out. It may keep 64 KiB of
// one event and no more; a larger one is handed on at once and read as it passes.
package main

import (
	"bytes"
)

const maxEvent = 64 << 10 // bytes of an event that are held; a usage chunk has a few hundred

// An eventType is a name that an event goes by, where it means something here.
type eventType uint8

const (
	eventNone         eventType = iota // no name
	eventOther                         // a name of no interest
	eventStart                         // Anthropic's first: usage without the output
	eventError                         // the stream broke after its status 200
	eventEnd                           // nothing comes after it
	eventResponseEnd                   // the same, with the usage in `response`
	eventResponseFail                  // the same, and the answer is an error
)

func eventTypeOf(name []byte) eventType {
	switch string(name) {
	case "":
		return eventNone
	case "message_start":
		return eventStart
	case "error":
		return eventError
	case "message_stop", "transcript.text.done", "speech.audio.done",
		"image_generation.completed", "image_edit.completed":
		return eventEnd
	case "response.completed", "response.incomplete":
		return eventResponseEnd
	case "response.failed":
		return eventResponseFail
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
	midLine bool   // the line has bytes
	afterCR bool   // the line ended with CR, so that an LF now is still part of its end
	begun   bool   // the event has bytes
	big     bool   // the event has passed maxEvent
	dropped bool   // the last event was left out
	hold    []byte // the event so far, when it came in pieces
	out     []byte // what pass returns when it is not a part of its argument

	// The event at hand.
	first   bool // it is the stream's first: a byte order mark may come
	reading bool // its data goes to the JSON reader
	hasData bool
	several bool // lines of data; one may end anywhere in the document
	field   lineField
	prefix  [6]byte // the name of the field so far
	nprefix int
	name    [64]byte // of `event:`; more than 64 bytes are of no interest
	nname   int
	head    [6]byte // the first bytes of the data
	nhead   int
	size    int64 // of the data

	// What the estimate is made of: complete events that carry a piece of the answer.
	deltas, deltaBytes int64
	smallest, smallish int64 // the two smallest sizes
}

// passEvents is pass for a stream.
func (m *meter) passEvents(p []byte) []byte {
	e := m.event
	ends := lineEnds{lf: -1, cr: -1}
	out := e.out[:0]
	from := 0  // p[from:start] goes out as it is
	start := 0 // where the event at hand starts in p
	for i := 0; i < len(p); {
		if e.afterCR {
			e.afterCR = false
			if p[i] == '\n' {
				i++
				if !e.begun { // it belongs to the event before, and goes its way
					if start = i; e.dropped {
						out = append(out, p[from:i-1]...)
						from = i
					}
				}
				continue
			}
		}
		e.begun = true
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
		if len(e.hold) > 0 {
			e.hold = append(e.hold, whole...)
			whole = e.hold
		}
		e.dropped = m.endEvent(whole, true) && m.strip
		switch {
		case e.dropped:
			out = append(out, p[from:start]...)
			from = i
		case len(e.hold) > 0:
			if m.strip {
				out = append(out, e.hold...)
			}
			from = i
		}
		e.hold, e.begun, e.big = e.hold[:0], false, false
		start = i
	}
	to := len(p)
	if rest := p[start:]; len(rest) > 0 {
		switch {
		case e.big:
			m.lines(rest)
		case len(e.hold)+len(rest) > maxEvent:
			m.beginBig()
			m.lines(e.hold)
			m.lines(rest)
			if m.strip {
				out = append(out, e.hold...)
			}
			e.hold = nil
		default:
			e.hold = append(e.hold, rest...)
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

// endEvents is end for a stream. An event without its empty line is read like any other: a client may
// do the same.
func (m *meter) endEvents() []byte {
	e := m.event
	if !e.begun {
		return nil
	}
	held := e.hold
	e.dropped = m.endEvent(held, false) && m.strip
	e.hold, e.begun, e.big = nil, false, false
	if e.dropped || !m.strip {
		return nil
	}
	return held
}

// endEvent reads the event that has come to its end, or the last part of a big one, and reports whether
// it is a usage chunk. complete: its empty line was seen.
func (m *meter) endEvent(b []byte, complete bool) bool {
	e := m.event
	big := e.big || len(b) > maxEvent
	switch {
	case e.big:
		m.lines(b)
	case big:
		m.beginBig()
		m.lines(b)
	default:
		m.lines(b)
		if m.matters(b) {
			e.clear()
			e.reading = true
			m.scan.reset(true)
			m.lines(b)
		}
	}
	chunk := e.hasData && m.take(complete) && !big
	e.clear()
	e.first = false
	return chunk
}

// beginBig turns to reading the event at hand as it passes.
func (m *meter) beginBig() {
	m.event.clear()
	m.event.big, m.event.reading = true, true
	m.scan.reset(true)
}

// clear forgets the lines of the event at hand.
func (e *eventReader) clear() {
	e.field, e.nprefix, e.nname, e.nhead, e.size = fieldStart, 0, 0, 0, 0
	e.hasData, e.several, e.reading = false, false, false
}

// matters reports whether the data of an event, whose lines were read, can change anything. Most events
// carry a word of the answer and nothing else, so this is what a stream costs. It may say yes in vain, but
// says no only where take would find nothing: no name before a colon is one that matters.
func (m *meter) matters(b []byte) bool {
	e := m.event
	if !e.hasData || string(e.head[:e.nhead]) == "[DONE]" {
		return false
	}
	if e.several {
		return true
	}
	// With an event line the type is known from there, and errors are.
	name := e.name[:e.nname]
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

// take draws the consequences of one event with data and reports whether it is a usage chunk.
func (m *meter) take(complete bool) bool {
	e, s := m.event, &m.scan
	m.events++
	name := e.name[:e.nname]
	finish := string(e.head[:e.nhead]) == "[DONE]"
	m.done = m.done || finish
	typ := eventTypeOf(name)
	fault := typ == eventError
	if e.reading {
		if s.typ != eventNone {
			typ = s.typ
		}
		fault = fault || s.hasError || typ == eventError
		m.model = s.model
	}
	m.failed = m.failed || fault
	// Named events that are no deltas repeat the answer or frame it.
	if !finish && !fault && complete && (len(name) == 0 || bytes.Contains(name, []byte("delta"))) {
		e.measure()
	}
	switch typ {
	case eventEnd, eventResponseEnd:
		m.done = true
	case eventResponseFail:
		m.done, m.failed = true, true
	}
	if !e.reading || !s.usageSeen {
		return false
	}
	switch {
	case s.usageInner && m.kind == meterAnthropic && typ == eventStart:
		s.usage.n[slotOutput] = countBad // it says 1; the true count comes with message_delta
		m.seen, m.report = true, s.usage
	case s.usageInner && m.kind == meterOpenAI && (typ == eventResponseEnd || typ == eventResponseFail):
		m.adopt()
	case s.usageInner: // of an event in between
	case m.kind == meterAnthropic && m.seen:
		m.report.merge(&s.usage)
	default:
		m.adopt()
	}
	return s.state == scanClosed && s.choicesEmpty && !s.usageInner
}

// measure adds the event to what the estimate is made of.
func (e *eventReader) measure() {
	e.deltas++
	e.deltaBytes += e.size
	switch {
	case e.deltas == 1:
		e.smallest, e.smallish = e.size, e.size
	case e.size < e.smallest:
		e.smallest, e.smallish = e.size, e.smallest
	case e.deltas == 2 || e.size < e.smallish:
		e.smallish = e.size
	}
}

// adopt takes the usage just read for the answer's: the last one wins, but not over a better one.
func (m *meter) adopt() {
	if !m.seen || m.scan.usage.usable() {
		m.seen, m.report = true, m.scan.usage
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

// lines reads the next bytes of the event at hand, in any pieces.
func (m *meter) lines(b []byte) {
	e := m.event
	ends := lineEnds{lf: -1, cr: -1}
	for i := 0; i < len(b); i++ {
		end := ends.next(b, i)
		if end > i {
			m.line(b[i:end])
		}
		if end < len(b) { // the LF of a CRLF ends an empty line here, which does no harm
			e.field, e.nprefix = fieldStart, 0
		}
		i = end
	}
}

// line reads a part of a line.
func (m *meter) line(b []byte) {
	e := m.event
	if e.field == fieldStart {
		if b = e.startLine(b); e.field == fieldSpace {
			if e.hasData { // data lines are joined by a line feed
				e.several = true
				m.data([]byte{'\n'})
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
		m.data(b)
	case fieldEvent:
		e.nname += copy(e.name[e.nname:], b)
	}
}

// startLine reads the name of a field up to its colon and returns what follows.
func (e *eventReader) startLine(b []byte) []byte {
	if e.nprefix == 0 { // nearly always
		if bytes.HasPrefix(b, []byte("data:")) {
			e.field = fieldSpace
			return b[5:]
		}
		if bytes.HasPrefix(b, []byte("event:")) {
			e.field, e.nname = fieldEventSpace, 0
			return b[6:]
		}
	}
	for i, c := range b {
		e.prefix[e.nprefix] = c
		e.nprefix++
		switch name := string(e.prefix[:e.nprefix]); {
		case name == "data:":
			e.field = fieldSpace
			return b[i+1:]
		case name == "event:":
			e.field, e.nname = fieldEventSpace, 0
			return b[i+1:]
		case e.first && name == "\uFEFF":
			e.nprefix = 0
		case !startsWith("data:", name) && !startsWith("event:", name) && !(e.first && startsWith("\uFEFF", name)):
			e.field = fieldOther
			return nil
		}
	}
	return nil
}

func startsWith(s, prefix string) bool { return len(s) >= len(prefix) && s[:len(prefix)] == prefix }

// data reads a part of the event's data.
func (m *meter) data(b []byte) {
	e := m.event
	e.size += int64(len(b))
	e.nhead += copy(e.head[e.nhead:], b)
	if e.reading {
		m.scan.feed(b)
	}
}
