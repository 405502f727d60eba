// This file meters one answer: which model gave it, how many tokens it used, whether it is complete. It sees
// the bytes as they pass and holds back one SSE event at most. It never changes a byte; it only leaves out the
// one event that the proxy itself asked for. Plain code: no network, no store, no clock. meter_sse.go cuts a
// stream into events, meter_json.go finds the few members of a document that matter, and meter_usage.go says
// what a usage object is worth.
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
	meterNone        meterKind = iota // the answer has no counts: files, lists
	meterOpenAI                       // input counts include cached tokens
	meterAnthropic                    // input counts exclude cached tokens
	meterEmbeddings                   // as meterOpenAI, but answers have no output tokens
	meterTranscripts                  // as meterOpenAI; without JSON or SSE an answer is a bare transcript
	meterMedia                        // as meterOpenAI; sound and pictures, whose size says nothing about tokens
	meterGemini                       // output counts exclude thoughts, input counts what tools have read
)

// An answerFormat is the form of an answer's body. Its first bytes decide, since providers and gateways name
// wrong types or none. A declared text/event-stream counts where the first bytes say nothing.
type answerFormat uint8

const (
	formatUnknown answerFormat = iota // only white space has come, or a part of a field's name
	formatJSON                        // one document, or several one after the other
	formatSSE
	formatOther   // text, HTML, sound
	formatEncoded // compressed
)

// A meter reads one answer as its bytes pass. Its fields and source are current after each call of process,
// even if the answer is cut off and finish is never called. If the source is estimated, an input of zero means
// that the answer has no input count; the caller can estimate it from the request. A meter is not safe for
// concurrent use.
type meter struct {
	counts      tokenCounts
	details     usageDetails
	model       string // as the answer names it, at most 256 bytes of valid UTF-8; "" while unknown
	done        bool   // the end was seen: [DONE], a final event, or the closing bracket of a JSON answer
	failed      bool   // the answer is an error, or became one, after its status 200
	errorEvent  []byte // the event of a stream that says so, clipped
	unmeasured  bool   // nothing in the answer says how many tokens it used: what was reserved has to do
	implausible bool   // usage has a count that no answer can have
	bytes       int64  // read, including those that were left out
	events      int64  // SSE events with data, including [DONE]

	kind          meterKind
	format        answerFormat
	declaredSSE   bool
	strip         bool
	ended         bool        // finish was called
	currentSource usageSource // "" before the first byte
	textOnly      bool        // of a stream whose usage is an estimate: only text has come since counts was set
	hasUsage      bool        // usage is from the answer
	usage         usageFields // of all usable usage objects
	tools         toolCounts  // of the response
	doneTools     toolCounts  // of the items of a stream that are done; they count if the response does not come
	scan          usageScanner
	text          textCounter
	textBytes     int64        // bytes of text in all deltas, or in all JSON documents
	documents     int64        // JSON documents that followed the first
	inList        bool         // they are elements of a list that has not ended: a stream of Gemini's API
	head          []byte       // the start of a field's name that may become an SSE field
	reader        *eventReader // of a stream
	spare         *eventReader // of an earlier answer, for its buffers; nil: there is none
}

// newMeter returns a meter for one answer. sse: the answer says that it is a text/event-stream. encoded: its
// bytes are compressed, and only counted. strip: the proxy itself asked for stream_options.include_usage, so
// the event with empty choices and a usage object is left out.
func newMeter(kind meterKind, sse, encoded, strip bool) *meter {
	return new(meter).renew(kind, sse, encoded, strip)
}

// renew returns m as newMeter would, whatever it was used for before. Only the space of its buffers stays.
func (m *meter) renew(kind meterKind, sse, encoded, strip bool) *meter {
	*m = meter{kind: kind, declaredSSE: sse, strip: strip && !encoded && kind == meterOpenAI,
		spare: cmp.Or(m.reader, m.spare)}
	if encoded {
		m.format = formatEncoded
	}
	m.scan.reset(false)
	m.scan.media = kind == meterMedia || kind == meterTranscripts
	return m
}

// source tells where counts come from.
func (m *meter) source() usageSource { return cmp.Or(m.currentSource, usageNone) }

// isStream reports whether the answer comes in events.
func (m *meter) isStream() bool { return m.format == formatSSE || m.documents > 0 }

// isUnfinished reports whether the answer was delivered whole, but is a JSON document without its end.
func (m *meter) isUnfinished() bool {
	return m.ended && m.format == formatJSON && (m.inList || m.scan.state != scanClosed && m.scan.state != scanBroken)
}

// process reads the next bytes of the answer and returns the bytes for the client: p itself unless strip is
// set. The result is valid until the next call.
func (m *meter) process(p []byte) []byte {
	m.bytes += int64(len(p))
	if m.kind == meterNone {
		return p
	}
	out := p
	if m.format == formatUnknown {
		start, ready := m.detectFormat(p)
		if out = m.processFormat(ready); start > 0 {
			out = append(p[:start:start], out...)
		}
	} else {
		out = m.processFormat(p)
	}
	if !m.strip {
		out = p
	}
	if m.textOnly {
		m.counts.output = m.estimateOutput()
		return out
	}
	m.counts, m.currentSource = m.currentUsage()
	m.textOnly = m.format == formatSSE && m.currentSource == usageEstimated && !m.hasUsage && !m.failed &&
		m.scan.durationMS == 0 && !m.reader.parsing
	return out
}

// detectFormat looks at the first bytes of the answer. It returns how many bytes of p come before the answer
// itself, and the bytes that can be read now: what is left of p, after what was held back of earlier pieces.
func (m *meter) detectFormat(p []byte) (start int, ready []byte) {
	if len(m.head) == 0 {
		for start < len(p) && isBlank(p[start]) {
			start++
		}
	}
	rest := p[start:]
	if len(m.head) > 0 {
		rest = append(m.head, p...)
	}
	if len(rest) == 0 {
		return start, nil
	}
	if m.format = formatOf(rest, m.declaredSSE); m.format == formatUnknown {
		m.head = bytes.Clone(rest)
		return start, nil
	}
	m.head = nil
	switch {
	case m.format == formatSSE:
		m.reader = m.spare.renew()
	case m.format == formatOther:
		m.failed = rest[0] == '<' && m.kind != meterTranscripts && m.kind != meterMedia // a page, where JSON is due
	}
	return start, rest
}

// isBlank reports whether c may come before an answer: white space, or a byte of a byte order mark.
func isBlank(c byte) bool {
	switch c {
	case ' ', '\t', '\r', '\n', 0xEF, 0xBB, 0xBF:
		return true
	}
	return false
}

// formatOf returns the format of an answer that begins with p, formatUnknown if p is too short to tell.
func formatOf(p []byte, declaredSSE bool) answerFormat {
	switch {
	case p[0] == '{' || p[0] == '[':
		return formatJSON
	case p[0] == '<': // a page, whatever its type says
		return formatOther
	case declaredSSE || p[0] == ':':
		return formatSSE
	}
	for _, field := range [...]string{"data:", "event:", "id:", "retry:"} {
		if n := min(len(p), len(field)); string(p[:n]) == field[:n] {
			if n < len(field) {
				return formatUnknown
			}
			return formatSSE
		}
	}
	return formatOther
}

// processFormat reads the next bytes once the format is known, and returns those for the client.
func (m *meter) processFormat(p []byte) []byte {
	switch m.format {
	case formatSSE:
		return m.processEvents(p)
	case formatJSON:
		m.processDocuments(p)
	}
	return p
}

// processDocuments reads JSON. Some gateways send a stream as one document after the other, and Gemini's API sends one
// as a list.
func (m *meter) processDocuments(p []byte) {
	if m.kind == meterGemini && m.documents == 0 && m.scan.state == scanStart && p[0] == '[' {
		m.inList, p = true, p[1:]
	}
	for len(p) > 0 {
		if m.scan.state == scanClosed {
			p = bytes.TrimLeft(p, " \t\r\n")
			if m.inList && len(p) > 0 && (p[0] == ',' || p[0] == ']') {
				m.inList = p[0] == ','
				p = bytes.TrimLeft(p[1:], " \t\r\n")
			}
			if len(p) > 0 && p[0] == '{' {
				m.scan.reset(true)
				m.documents++
			}
		}
		n := m.scan.feed(p)
		if m.countsText() {
			m.text.feed(p[:n])
		}
		p = p[n:]
		switch {
		case m.documents == 0:
			m.hasUsage, m.usage, m.tools = m.scan.usageSeen, m.scan.usage, m.scan.tools
		case m.scan.state == scanClosed && m.scan.usageSeen:
			m.applyUsage(m.scan.eventType)
		}
		if m.scan.state == scanClosed {
			m.textBytes += m.text.sum()
			m.text = textCounter{}
		}
		m.failed = m.failed || m.scan.saysError() || m.scan.statusFailed
	}
	m.model, m.done = m.scan.model, m.scan.state == scanClosed && !m.inList
}

// hasDeltas reports whether a part of an answer has come, before any error.
func (m *meter) hasDeltas() bool {
	return m.textBytes > 0 || m.format == formatSSE && m.reader.deltas > 0
}

// countsText reports whether the text in the answer is of interest.
func (m *meter) countsText() bool { return m.kind != meterEmbeddings && m.kind != meterMedia }

// pendingResponse returns the id of a stored response whose usage is not known when its answer ends, because the
// provider goes on with it; "" otherwise. With a stream that was cut it only does if background was requested.
func (m *meter) pendingResponse(background bool) string {
	if m.hasUsage || m.failed || m.scan.status != responseRunning || m.isStream() && !background {
		return ""
	}
	return string(m.scan.id[:m.scan.idLen])
}

// responseUsage returns what a stored response has used, according to an answer that shows it, and whether the answer
// says so. reservedInput counts where a response has ended without usage.
func (m *meter) responseUsage(reservedInput int64) (counts tokenCounts, source usageSource, known bool) {
	switch {
	case m.scan.status == responseRunning || m.scan.status == responseUnknown && !m.hasUsage:
		return tokenCounts{}, usageNone, false
	case m.hasUsage && m.source() == usageExact:
		return m.counts, usageExact, true
	case m.scan.status == responseFailed && !m.hasUsage: // an error bills nothing but what it says
		return tokenCounts{}, usageNone, true
	}
	return tokenCounts{input: reservedInput, output: max(m.counts.output, m.estimateOutput())}, usageEstimated, true
}

// finish reads the end of an answer that was delivered whole, and returns the bytes that were held back. The
// result is empty unless strip is set.
func (m *meter) finish() []byte {
	if m.kind == meterNone {
		return nil
	}
	m.ended = true
	var rest []byte
	switch {
	case m.format == formatSSE:
		rest = m.finishEvents()
	case m.format == formatUnknown && len(m.head) > 0:
		if m.format = formatOther; m.strip {
			rest = m.head
		}
	case m.format == formatUnknown && !m.declaredSSE:
		m.failed = true // an answer that is empty
	}
	m.counts, m.currentSource = m.currentUsage()
	return rest
}

// currentUsage returns the counts so far and where they come from.
func (m *meter) currentUsage() (tokenCounts, usageSource) {
	m.unmeasured, m.implausible, m.details = false, false, usageDetails{}
	switch {
	case m.bytes == 0:
		return tokenCounts{}, usageNone
	case !m.hasUsage && m.format == formatJSON && m.scan.topLevelInput:
		return tokenCounts{}, usageNone // a count_tokens answer: the tokens were counted, not used
	case !m.hasUsage && (m.failed || m.isUnfinished()) && !m.hasDeltas():
		return tokenCounts{}, usageNone // an error bills nothing but what it says
	case m.format == formatUnknown: // so far nothing but white space
		return tokenCounts{}, usageEstimated
	case !m.hasUsage:
		m.details.inputMS = m.scan.durationMS // of which it is not known how it is rounded
		m.completeDetails()
		if m.scan.durationMS > 0 {
			return tokenCounts{}, usageEstimated
		}
		m.unmeasured = m.kind == meterMedia || m.kind == meterTranscripts && m.format == formatOther
		return tokenCounts{output: m.estimateOutput()}, usageEstimated
	}
	u := m.usage.evaluate(m.kind, m.textBytes > 0)
	m.implausible, m.details = u.implausible, u.details
	m.completeDetails()
	switch {
	case u.byDuration && u.details.inputMS > 0:
		return tokenCounts{}, usageExact
	case u.byDuration:
		return tokenCounts{}, usageNone
	case u.inputKnown && u.outputKnown:
		return u.counts, usageExact
	}
	if !u.outputKnown {
		// The stream was cut before its final count, or the count is no measurement.
		m.unmeasured = m.kind == meterMedia
		u.counts.output = max(u.counts.output, min(m.estimateOutput(), maxBilledTokens-u.counts.input))
	}
	if !u.inputKnown && !u.implausible { // the sum may be known
		u.counts.input = max(u.counts.input, u.total-u.counts.output)
	}
	return u.counts, usageEstimated
}

// compression is how many times an answer in one piece is larger than its compressed bytes. A stream repeats its
// envelopes so often that its compressed bytes are about its text.
const compression = 3

// completeDetails fills in the conditions and tools that the answer names.
func (m *meter) completeDetails() {
	d, named := &m.details, &m.scan.conditions
	d.tier, d.speed, d.region, d.searchContext = named.tier, named.speed, named.region, named.searchContext
	tools := &m.tools
	if *tools == (toolCounts{}) {
		tools = &m.doneTools
	}
	if d.webSearches += tools.webSearches + m.scan.queries.count; m.kind == meterGemini {
		d.webSearches = billedByGoogle(d.webSearches, m.scan.model)
	}
	d.fileSearches, d.codeSessions, d.imageCalls = tools.fileSearches, tools.codeSessions, tools.imageCalls
}

// estimateOutput estimates the output tokens: a stream's from the text in its deltas, any other answer's from
// its size.
func (m *meter) estimateOutput() int64 {
	switch {
	case m.kind == meterEmbeddings || m.kind == meterMedia || m.format == formatUnknown:
		return 0
	case m.format == formatSSE:
		return max(m.reader.deltas, estimateTokens(m.textBytes))
	case m.documents > 0:
		return max(m.documents, estimateTokens(m.textBytes))
	case m.format == formatEncoded && !m.declaredSSE:
		return estimateTokens(m.bytes * compression)
	}
	return estimateTokens(m.bytes)
}

// estimateTokens applies the usual rule of thumb: four bytes per token, rounded up.
func estimateTokens(bytes int64) int64 {
	if bytes <= 0 {
		return 0
	}
	return (bytes-1)/4 + 1
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

// slotFor returns the slot of the member with this name in the innermost known object.
func (s *usageScanner) slotFor(name []byte) slot {
	switch s.scopes[s.level-1] {
	case scopeTop:
		if s.batch {
			return batchSlot(name)
		}
		if sl := mediaSlot(name); s.media && sl != slotNone {
			return sl
		}
		if s.readID && string(name) == "id" && !s.readNested {
			return slotID
		}
		return topLevelSlot(name, s.readNested)
	case scopeNested:
		return s.nestedSlot(name)
	case scopeChoice:
		return choiceSlot(name)
	case scopeVendor:
		if string(name) == "usage" {
			return slotUsage
		}
	case scopeBaseResp:
		if string(name) == "status_code" {
			return slotFailure
		}
	case scopeUsage:
		return usageSlot(name)
	case scopeIteration:
		if string(name) == "type" {
			return slotIterationType
		}
		if sl := usageSlot(name); sl <= slotCacheWrite1h || sl == slotCacheCreation {
			return sl
		}
	case scopeItem, scopeAction:
		return itemSlot(s.scopes[s.level-1], name)
	default:
		return detailSlot(s.scopes[s.level-1], name)
	}
	return slotNone
}

// nestedSlot is slotFor in a response or message.
func (s *usageScanner) nestedSlot(name []byte) slot {
	switch string(name) {
	case "usage":
		return slotUsage
	case "model":
		return slotModel
	case "status":
		return slotStatus
	case "output":
		return slotOutputList
	case "service_tier":
		return slotServiceTier
	case "id":
		if s.readID {
			return slotID
		}
	case "body", "message": // the answer itself, in OpenAI's and Anthropic's form
		if s.batch && s.level == 2 {
			return slotNested
		}
	case "data":
		if s.batch {
			return slotData
		}
	}
	return slotNone
}

// topLevelSlot is slotFor in a document, or in an event of a stream.
func topLevelSlot(name []byte, readNested bool) slot {
	switch string(name) {
	case "usage", "usageMetadata":
		return slotUsage
	case "model", "modelVersion":
		return slotModel
	case "candidates":
		return slotCandidates
	case "promptFeedback":
		return slotFeedback
	case "type", "event_type":
		return slotType
	case "error":
		return slotError
	case "choices":
		return slotChoices
	case "x_groq", "result":
		return slotVendor
	case "status":
		return slotStatus
	case "input_tokens":
		return slotTopLevelInput
	case "output":
		return slotOutputList
	case "service_tier":
		return slotServiceTier
	case "item":
		if readNested {
			return slotItem
		}
	case "response", "message", "interaction":
		if readNested {
			return slotNested
		}
		return slotVendor
	case "errors", "error_code":
		return slotFailure
	case "success":
		return slotSuccess
	case "object":
		return slotKind
	case "base_resp":
		return slotBaseResp
	case "msg", "detail", "error_msg", "error_message", "errorMessage":
		return slotWords
	case "content", "data", "text", "delta", "results", "completion":
		return slotAnswer
	}
	return slotNone
}

// batchSlot is slotFor in a line of the results of a batch.
func batchSlot(name []byte) slot {
	switch string(name) {
	case "custom_id":
		return slotCustomID
	case "response", "result":
		return slotNested
	}
	return slotNone
}

// isAnswer reports whether a value of this kind, at the top level, is a part of an answer.
func (s slot) isAnswer() bool {
	switch s {
	case slotAnswer, slotPictures, slotUsage, slotChoices, slotCandidates, slotFeedback, slotNested, slotVendor,
		slotOutputList:
		return true
	}
	return false
}

// choiceSlot is slotFor in an element of choices.
func choiceSlot(name []byte) slot {
	switch string(name) {
	case "usage":
		return slotUsage
	case "error":
		return slotFailure
	case "finish_reason":
		return slotKind
	}
	return slotNone
}

// saysError reports whether an event is an error, by any of its members.
func saysError(event []byte) bool {
	var s usageScanner
	s.reset(true)
	s.feedAll(event)
	return s.saysError()
}

// saysError reports whether the document is an error, as far as it has been read. Some providers and gateways have
// other members for that than error, or send a message in place of an answer.
func (s *usageScanner) saysError() bool {
	return s.hasError || s.hasFailure || s.eventType == eventError ||
		s.state == scanClosed && s.hasWords && !s.hasAnswer && !(s.readNested && s.typeSeen)
}

// setError records that an error, or another value that says that there is one, is not empty.
func (s *usageScanner) setError() {
	if s.slot == slotError {
		s.hasError = true
	} else {
		s.hasFailure = true
	}
}

// maxBatchModels is how many models of one batch are counted by name.
const maxBatchModels = 16

// A batchMeter adds up what the answers in the results of a batch have used. Results are lines of JSON, of any size and
// in any order, each with one answer. A line that has another form, as in any other file, counts nothing.
type batchMeter struct {
	line     meter
	answer   usageDetails      // what all answers have in common: conditions of the price
	price    func(*requestRow) // fills in the cost of an answer
	models   []batchUsage      // at most two for each model
	isResult bool              // a line was a result
}

// newBatchMeter returns a meter of results in the form of an API.
func newBatchMeter(kind meterKind, answer usageDetails, price func(*requestRow)) *batchMeter {
	b := &batchMeter{line: meter{kind: kind, format: formatJSON}, answer: answer, price: price}
	b.answer.tier = tierBatch
	b.nextLine()
	return b
}

// process reads the next bytes of the results.
func (b *batchMeter) process(p []byte) {
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n')
		text := p[:max(end, 0)]
		if end < 0 {
			text, end = p, len(p)-1
		}
		b.line.bytes += int64(len(text))
		b.line.scan.feedAll(text)
		b.line.text.feed(text)
		if p[end] == '\n' {
			b.endLine(true)
		}
		p = p[end+1:]
	}
}

// finish ends the last line, which may be cut.
func (b *batchMeter) finish() { b.endLine(b.line.scan.state == scanClosed) }

// endLine ends a line. An answer without usage is estimated if it is complete; a line that was cut before its usage
// counts when it is read again.
func (b *batchMeter) endLine(complete bool) {
	m := &b.line
	if m.scan.isResult {
		b.isResult = true
		m.hasUsage, m.usage, m.tools, m.textBytes = m.scan.usageSeen, m.scan.usage, m.scan.tools, m.text.sum()
		if m.hasUsage || complete && m.textBytes > 0 { // otherwise it is an error, or free
			b.add()
		}
	}
	b.nextLine()
}

func (b *batchMeter) nextLine() {
	m := &b.line
	m.scan = usageScanner{batch: true, text: m.scan.text[:0]}
	m.scan.reset(true)
	m.text, m.bytes = textCounter{}, 0
}

// add adds the answer in the current line.
func (b *batchMeter) add() {
	var row requestRow
	m := &b.line
	row.counts, row.source = m.currentUsage()
	if row.source == usageNone {
		return
	}
	row.model, row.details = m.scan.model, m.details
	row.details.tier, row.details.multiplier = tierBatch, b.answer.multiplier
	row.details.region = cmp.Or(row.details.region, b.answer.region)
	if m.scan.hasData && !m.usage.hasOutputDetails() { // embeddings have no output
		row.details.imageOutput = row.counts.output
	}
	b.price(&row)
	sum := b.sumFor(&row)
	sum.lines++
	sum.addUsage(&row)
}

// sumFor returns the sum that an answer counts in.
func (b *batchMeter) sumFor(row *requestRow) *batchUsage {
	for range 2 {
		for i := range b.models {
			if u := &b.models[i]; u.model == row.model && u.priced == row.priced {
				return u
			}
		}
		if len(b.models) < 2*maxBatchModels {
			break
		}
		row.model = ""
	}
	u := batchUsage{requestRow: requestRow{details: b.answer}}
	u.model, u.priced, u.price, u.source = row.model, row.priced, row.price, usageExact
	u.details.region, u.details.speed = row.details.region, row.details.speed
	u.details.searchContext = row.details.searchContext
	b.models = append(b.models, u)
	return &b.models[len(b.models)-1]
}
