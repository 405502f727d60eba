// This file meters one answer: which model gave it, how many tokens it used, whether it is complete. It sees
// the bytes as they pass and holds back one SSE event at most. It never changes a byte; it only leaves out the
// one event that the proxy itself asked for. Plain code: no network, no store, no clock. meter_sse.go cuts a
// stream into events, and meter_json.go finds the few members of a document that matter.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"strings"
	"unicode"
	"unicode/utf8"
)

const maxReportedModelLen = 256 // bytes; a longer model name is ignored

// A meterKind is a provider's way of counting tokens.
type meterKind uint8

const (
	meterNone      meterKind = iota // the answer has no counts: audio, files, lists
	meterOpenAI                     // input counts include cached tokens
	meterAnthropic                  // input counts exclude cached tokens
)

// A meter reads one answer as its bytes pass. Its fields and source are current after each call of process,
// even if the answer is cut off and finish is never called. If the source is estimated, an input of zero means
// that the answer has no input count; the caller can estimate it from the request. A meter is not safe for
// concurrent use.
type meter struct {
	counts tokenCounts
	model  string // as the answer names it, at most 256 bytes of valid UTF-8; "" while unknown
	done   bool   // the end was seen: [DONE], a final event, or the closing bracket of a JSON answer
	failed bool   // the stream carried an error after its status 200
	bytes  int64  // read, including those that were left out
	events int64  // SSE events with data, including [DONE]

	kind          meterKind
	sse           bool
	opaque        bool
	strip         bool
	currentSource usageSource // "" before the first byte
	hasUsage      bool        // usage is from the answer
	usage         usageFields // the last usable usage object
	scan          usageScanner
	reader        *eventReader // of a stream
}

// newMeter returns a meter for one answer. sse: the answer is a text/event-stream. opaque: its bytes cannot be
// read (it is compressed, or neither JSON nor SSE) and are only counted. strip: the proxy itself asked for
// stream_options.include_usage, so the event with empty choices and a usage object is left out.
func newMeter(kind meterKind, sse, opaque, strip bool) *meter {
	m := &meter{kind: kind, sse: sse, opaque: opaque, strip: strip && sse && !opaque && kind == meterOpenAI}
	m.scan.reset(sse)
	if sse {
		m.reader = &eventReader{}
	}
	return m
}

// source tells where counts come from.
func (m *meter) source() usageSource { return cmp.Or(m.currentSource, usageNone) }

// process reads the next bytes of the answer and returns the bytes for the client: p itself unless strip is
// set. The result is valid until the next call.
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

// finish reads the end of the answer, whether it is complete or cut off, and returns the bytes that were held
// back. The result is empty unless strip is set.
func (m *meter) finish() []byte {
	if !m.sse || m.opaque || m.kind == meterNone {
		return nil
	}
	rest := m.finishEvents()
	m.counts, m.currentSource = m.currentUsage()
	return rest
}

// currentUsage returns the counts so far and where they come from.
func (m *meter) currentUsage() (tokenCounts, usageSource) {
	switch {
	case m.kind == meterNone || m.bytes == 0:
		return tokenCounts{}, usageNone
	case !m.hasUsage && !m.sse && m.scan.topLevelInput:
		return tokenCounts{}, usageNone // a count_tokens answer: the tokens were counted, not used
	case !m.hasUsage:
		return tokenCounts{output: m.estimateOutput()}, usageEstimated
	}
	f := m.usage
	in, out := f.n[slotInput], f.n[slotOutput]
	switch {
	case in < 0 && out < 0 && f.byDuration:
		return tokenCounts{}, usageNone // billed by duration
	case out == countInvalid || in < 0 && out < 0:
		// The stream was cut before its final count, or the count is invalid. The size of the answer is a
		// better estimate than zero.
		f.n[slotOutput] = m.estimateOutput()
		return f.normalize(m.kind), usageEstimated
	case in < 0:
		return f.normalize(m.kind), usageEstimated
	}
	return f.normalize(m.kind), usageExact // embeddings have no output
}

// estimateOutput estimates the output tokens from the size of the answer.
func (m *meter) estimateOutput() int64 {
	if !m.sse || m.opaque {
		return estimateTokens(m.bytes)
	}
	// Every event repeats the same envelope around a few letters of text. The size of the second smallest
	// event approximates the envelope; the smallest is often the last one of a chat stream, which lacks even
	// the member for the text.
	e := m.reader
	return max(e.deltas, (e.deltaBytes-e.deltas*e.secondSmallest)/4)
}

// estimateTokens applies the usual rule of thumb: four bytes per token, rounded up.
func estimateTokens(bytes int64) int64 {
	if bytes <= 0 {
		return 0
	}
	return (bytes-1)/4 + 1
}

const (
	countMissing = -1 // the usage object lacks the count
	countInvalid = -2 // the count is not an integer of 0 or more
)

// usageFields are the raw counts of one usage object, by slot.
type usageFields struct {
	n          [numCountSlots]int64
	byDuration bool // the answer is billed by seconds of audio
}

// clear makes every count missing.
func (f *usageFields) clear() {
	for i := range f.n {
		f.n[i] = countMissing
	}
	f.byDuration = false
}

// setMax keeps the largest value of a slot: some gateways send the same count under two names, one of them
// zero.
func (f *usageFields) setMax(s slot, v int64) {
	if v != countInvalid {
		f.n[s] = max(f.n[s], v)
	} else if f.n[s] == countMissing {
		f.n[s] = countInvalid
	}
}

// hasCounts reports whether f has an input or an output count.
func (f *usageFields) hasCounts() bool { return f.n[slotInput] >= 0 || f.n[slotOutput] >= 0 }

// merge adds the counts of a later usage object. Anthropic's counts are running totals, so a zero after a
// positive count is a gateway's filler and is ignored.
func (f *usageFields) merge(later *usageFields) {
	for i, v := range later.n {
		if v > 0 || v == 0 && f.n[i] < 0 || v == countInvalid && f.n[i] == countMissing {
			f.n[i] = v
		}
	}
}

// normalize returns the counts as the ledger keeps them; see tokenCounts.
func (f *usageFields) normalize(kind meterKind) tokenCounts {
	at := func(s slot) int64 { return min(max(f.n[s], 0), maxTokenCount) }
	c := tokenCounts{
		input: at(slotInput), cached: at(slotCached), cacheWrite: at(slotCacheWrite), output: at(slotOutput),
		reasoning: at(slotReasoning), audioInput: at(slotAudioInput), audioOutput: at(slotAudioOutput),
	}
	if kind == meterAnthropic {
		c.input = min(c.input+c.cached+c.cacheWrite, maxTokenCount)
	}
	// xAI counts reasoning beside the completion, not in it. Only the total shows it.
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

// sanitizeModelName decodes the inside of a JSON string. It returns "" if the name cannot be logged, stored and
// shown as it is: if it is not valid UTF-8 or has control characters.
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
	if strings.ContainsFunc(name, unicode.IsControl) {
		return ""
	}
	return name
}
