// meter.go meters one answer: which model spoke, how many tokens it counted, whether it came to its end.
// It sees the bytes as they pass and may hold back one SSE event at most; it never changes a byte, it only
// leaves out the one chunk that the proxy itself asked for. Plain code: no network, no store, no clock.
// meter_sse.go cuts a stream into events, meter_json.go finds the few members that matter in a document.
package main

import (
	"bytes"
	"encoding/json"
	"unicode"
	"unicode/utf8"
)

const maxReportedModelLen = 256 // bytes of a model name; a longer one is not believed

// meterKind says whose way of counting an endpoint follows.
type meterKind uint8

const (
	meterNone      meterKind = iota // nothing to read: audio, files, lists
	meterOpenAI                     // input counts include cached tokens
	meterAnthropic                  // input counts exclude cached tokens
)

// A meter reads one answer as its bytes pass. Its fields and source are up to date after each pass, also
// when the answer is cut and end is never called. When the source is estimated, an input of zero means that
// the answer did not say: the caller has the request to guess from. It is not safe for concurrent use.
type meter struct {
	counts tokenCounts
	model  string // as the answer names it, at most 256 bytes of clean UTF-8; "" while unknown
	done   bool   // the end was seen: [DONE], a last event, or the closing bracket of a unary answer
	failed bool   // the stream carried an error after its status 200
	bytes  int64  // taken in, also what was not handed on
	events int64  // SSE events that carried data, [DONE] included

	kind          meterKind
	sse           bool
	opaque        bool
	strip         bool
	currentSource usageSource // what source returns, "" before the first byte
	hasUsage      bool        // report is from the answer
	usage         usageFields // the last usable usage object
	scan          usageScanner
	reader        *eventReader // of a stream
}

// newMeter returns a meter for one answer. sse: it is a text/event-stream. opaque: its bytes cannot be read
// (Content-Encoding, neither JSON nor SSE) and are only counted. strip: the proxy itself asked for
// stream_options.include_usage, so the event with empty choices and a usage object is left out.
func newMeter(kind meterKind, sse, opaque, strip bool) *meter {
	m := &meter{kind: kind, sse: sse, opaque: opaque, strip: strip && sse && !opaque && kind == meterOpenAI}
	m.scan.reset(sse)
	if sse {
		m.reader = &eventReader{}
	}
	return m
}

// source says where counts come from.
func (m *meter) source() usageSource {
	if m.currentSource == "" {
		return usageNone
	}
	return m.currentSource
}

// process takes the next bytes of the answer and returns what the client gets now: p itself unless strip is
// on. The result is valid until the next call.
func (m *meter) process(p []byte) []byte {
	m.bytes += int64(len(p))
	switch {
	case m.kind == meterNone || m.opaque:
	case m.sse:
		p = m.processEvents(p)
	default:
		m.scan.feed(p)
		m.model, m.done = m.scan.model, m.scan.state == scanClosed
		m.hasUsage, m.usage = m.scan.usageSeen, m.scan.usage
	}
	m.counts, m.currentSource = m.currentUsage()
	return p
}

// finish tells the meter that no more bytes come, whether the answer ended properly or was cut, and returns
// what was still held. The result is empty unless strip is on.
func (m *meter) finish() []byte {
	if !m.sse || m.opaque || m.kind == meterNone {
		return nil
	}
	held := m.finishEvents()
	m.counts, m.currentSource = m.currentUsage()
	return held
}

// currentUsage works out the counts so far and where they come from.
func (m *meter) currentUsage() (tokenCounts, usageSource) {
	switch {
	case m.kind == meterNone || m.bytes == 0:
		return tokenCounts{}, usageNone
	case !m.hasUsage && !m.sse && m.scan.topLevelInput:
		return tokenCounts{}, usageNone // a count_tokens answer: counted, not consumed
	case !m.hasUsage:
		return tokenCounts{output: m.estimateOutput()}, usageEstimated
	}
	f := m.usage
	in, out := f.n[slotInput], f.n[slotOutput]
	switch {
	case in < 0 && out < 0 && f.byDuration:
		return tokenCounts{}, usageNone // billed by duration
	case out == countInvalid || in < 0 && out < 0:
		// Half a report: the stream was cut before its last count, or the count is nonsense. The size
		// of what was sent says more than a zero.
		f.n[slotOutput] = m.estimateOutput()
		return f.normalize(m.kind), usageEstimated
	case in < 0:
		return f.normalize(m.kind), usageEstimated
	}
	return f.normalize(m.kind), usageExact // without output in embeddings
}

// estimateOutput guesses the output tokens from the size of what was sent.
func (m *meter) estimateOutput() int64 {
	if !m.sse || m.opaque {
		return estimateTokens(m.bytes)
	}
	// Every event repeats the same envelope around a few letters. The smallest event shows its size, but
	// for the last of a chat stream, which has no letters and not even their member: so the second smallest.
	e := m.reader
	return max(e.deltas, (e.deltaBytes-e.deltas*e.secondSmallest)/4)
}

// estimateTokens is the usual rule of thumb: four bytes to a token, rounded up.
func estimateTokens(bytes int64) int64 {
	if bytes <= 0 {
		return 0
	}
	return (bytes-1)/4 + 1
}

// A count that is not in a usage object, and one that is there but is no integer of 0 or more.
const (
	countMissing = -1
	countInvalid = -2
)

// usageFields are the counts of one usage object as it has them, by slot.
type usageFields struct {
	n          [numCountSlots]int64
	byDuration bool // the answer is measured in seconds of audio
}

// clear makes every count missing.
func (f *usageFields) clear() {
	for i := range f.n {
		f.n[i] = countMissing
	}
	f.byDuration = false
}

// setMax keeps the largest value given for a slot: gateways send the same count under two names, one of
// them zero.
func (f *usageFields) setMax(s slot, v int64) {
	if v != countInvalid {
		f.n[s] = max(f.n[s], v)
	} else if f.n[s] == countMissing {
		f.n[s] = countInvalid
	}
}

// hasCounts reports whether f is worth believing at all.
func (f *usageFields) hasCounts() bool { return f.n[slotInput] >= 0 || f.n[slotOutput] >= 0 }

// merge takes over what a later object says. Anthropic's counts are running totals, so a zero after a
// positive count is a gateway's filler and does not undo it.
func (f *usageFields) merge(later *usageFields) {
	for i, v := range later.n {
		if v > 0 || v == 0 && f.n[i] < 0 || v == countInvalid && f.n[i] == countMissing {
			f.n[i] = v
		}
	}
}

// normalize turns the counts into the form the ledger keeps, within its bounds.
func (f *usageFields) normalize(kind meterKind) tokenCounts {
	at := func(s slot) int64 { return min(max(f.n[s], 0), maxTokenCount) }
	c := tokenCounts{
		input: at(slotInput), cached: at(slotCached), cacheWrite: at(slotCacheWrite), output: at(slotOutput),
		reasoning: at(slotReasoning), audioInput: at(slotAudioInput), audioOutput: at(slotAudioOutput),
	}
	if kind == meterAnthropic {
		c.input = min(c.input+c.cached+c.cacheWrite, maxTokenCount)
	}
	// xAI counts reasoning beside the completion, not in it; only the total tells.
	if c.reasoning > 0 && at(slotTotal) == c.input+c.output+c.reasoning {
		c.output = min(c.output+c.reasoning, maxTokenCount)
	}
	c.cached = min(c.cached, c.input)
	c.cacheWrite = min(c.cacheWrite, c.input-c.cached)
	c.audioInput = min(c.audioInput, c.input)
	c.reasoning = min(c.reasoning, c.output)
	c.audioOutput = min(c.audioOutput, c.output)
	return c
}

// sanitizeModelName returns the text of a JSON string, without its quotes, or "" unless it can be logged, stored
// and shown as it is: valid UTF-8, no control characters, not too long.
func sanitizeModelName(raw []byte) string {
	name := string(raw)
	if !utf8.ValidString(name) {
		return ""
	}
	if bytes.IndexByte(raw, '\\') >= 0 { // PHP gateways write openai\/gpt-4o
		var plain string
		if json.Unmarshal([]byte(`"`+name+`"`), &plain) != nil {
			return ""
		}
		name = plain
	}
	for _, r := range name {
		if unicode.IsControl(r) {
			return ""
		}
	}
	return name
}
