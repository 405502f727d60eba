// This file says what a usage object is worth: the one set of rules for counts that are missing, zero, written
// in odd ways, beyond belief, or beside each other. meter_json.go fills the fields; the meter estimates what
// evaluate does not know. It also holds the names of members, which differ between APIs and gateways. An
// estimate is made of the text in an answer, which textCounter counts: what a model wrote, thought, or passed to
// a tool, by the names that APIs give to it, without the envelope. It need not be exact, but must not depend on
// how the bytes come in pieces. Plain code.
package main

import (
	"bytes"
	"hash/fnv"
	"math"
	"slices"
	"strconv"
	"strings"
)

// maxBilledTokens is the most that one call is billed for. No model reads or writes as much in one call, so a
// larger count is a fault of the provider, and the call is estimated.
const maxBilledTokens = 100_000_000

const (
	countMissing     = -1 // the usage object lacks the count
	countInvalid     = -2 // the count is not a number of 0 or more
	countImplausible = -3 // the count is more than maxBilledTokens
)

const maxCountLen = 40 // bytes of a number; a longer one is no count

// parseTokenCount reads a count as providers write it: 12, 12.0, 1.2e1, and the same in quotes. Fractions of a
// token are rounded up. Numbers are at most maxCountLen bytes long.
func parseTokenCount(text []byte) int64 {
	text = bytes.TrimSpace(text)
	var n int64
	for i, c := range text {
		if c < '0' || c > '9' || i == 15 {
			return parseFraction(text)
		}
		n = n*10 + int64(c-'0')
	}
	switch {
	case len(text) == 0:
		return countInvalid
	case n > maxBilledTokens:
		return countImplausible
	}
	return n
}

// parseFraction is parseTokenCount for what is not a short row of digits.
func parseFraction(text []byte) int64 {
	for _, c := range text {
		if (c < '0' || c > '9') && c != '.' && c != '-' && c != '+' && c != 'e' && c != 'E' {
			return countInvalid // among them nan, inf and hexadecimal numbers
		}
	}
	v, err := strconv.ParseFloat(string(text), 64)
	switch {
	case v < 0 || err != nil && v == 0 || math.IsNaN(v):
		return countInvalid
	case v > maxBilledTokens: // with an error, v is infinite
		return countImplausible
	}
	return int64(math.Ceil(v))
}

// usageFields are the raw counts of one usage object, by slot.
type usageFields struct {
	n           [numCountSlots]int64
	beside      [slotCacheWrite1h + 1]int64 // counts of iterations that the others leave out
	byDuration  bool                        // the answer is billed by seconds of audio
	inputMS     int64                       // these, in milliseconds
	implausible bool                        // a count was more than maxBilledTokens
}

// clear makes every count missing.
func (f *usageFields) clear() {
	*f = usageFields{}
	for i := range f.n {
		f.n[i] = countMissing
	}
}

// setMax keeps the largest value of a slot: some gateways send the same count under two names, one of them
// zero.
func (f *usageFields) setMax(s slot, v int64) {
	f.implausible = f.implausible || v == countImplausible
	if v >= 0 {
		f.n[s] = max(f.n[s], v)
	} else if f.n[s] == countMissing {
		f.n[s] = countInvalid
	}
}

// addBeside adds the counts of an iteration that the object's own counts leave out.
func (f *usageFields) addBeside(iteration *usageFields) {
	for s := slotInput; s <= slotCacheWrite1h; s++ {
		f.beside[s] = min(f.beside[s]+max(iteration.n[s], 0), maxBilledTokens+1)
	}
	f.implausible = f.implausible || iteration.implausible
}

// merge adds the counts of a later usage object. Later counts win, except that a zero after a positive count is
// a gateway's filler, and an invalid one says nothing.
func (f *usageFields) merge(later *usageFields) {
	for i, v := range later.n {
		if v > 0 || v == 0 && f.n[i] < 0 || v == countInvalid && f.n[i] == countMissing {
			f.n[i] = v
		}
	}
	for i, v := range later.beside {
		if v > 0 {
			f.beside[i] = v
		}
	}
	f.byDuration = f.byDuration || later.byDuration
	f.inputMS = max(f.inputMS, later.inputMS)
	f.implausible = f.implausible || later.implausible
}

// A usageValue is what a usage object is worth.
type usageValue struct {
	counts      tokenCounts
	details     usageDetails // without conditions and the tools of a response
	inputKnown  bool
	outputKnown bool
	byDuration  bool // the answer is not billed in tokens
	implausible bool // the object has a count that cannot be
	total       int64
}

// evaluate applies the rules. hasText: the answer has text, so an output of zero is no measurement.
func (f *usageFields) evaluate(kind meterKind, hasText bool) (u usageValue) {
	at := func(s slot) int64 { return max(f.n[s], 0) }
	in, out := f.n[slotInput], f.n[slotOutput]
	if in < 0 && out < 0 && f.byDuration {
		return usageValue{byDuration: true, details: usageDetails{inputMS: f.inputMS}}
	}
	cached, cacheWrite := at(slotCached)+f.beside[slotCached], f.cacheWrites()
	switch kind {
	case meterAnthropic:
		in, out = max(in, 0)+cached+cacheWrite+f.beside[slotInput], withBeside(out, f.beside[slotOutput])
	case meterGemini:
		in, out = f.splitGemini()
	default:
		in, out = f.splitTotal(kind)
	}
	if out <= 0 && kind != meterEmbeddings && at(slotReasoning) > 0 { // the model has got no further than its thoughts
		out = at(slotReasoning)
	}
	// A call always has input. It may lack output, but not if its answer has text.
	u.inputKnown = in > 0
	u.outputKnown = kind == meterEmbeddings || out > 0 || !hasText && out != countInvalid && u.inputKnown
	c := tokenCounts{
		input: max(in, 0), cached: cached, cacheWrite: cacheWrite, output: max(out, 0),
		reasoning: at(slotReasoning), audioInput: at(slotAudioInput), audioOutput: at(slotAudioOutput),
	}
	if u.implausible = f.implausible; c.input+c.output > maxBilledTokens {
		u.implausible, c = true, tokenCounts{}
		u.outputKnown = false
	}
	u.inputKnown = u.inputKnown && !u.implausible // the row is an estimate, flagged
	u.total = min(at(slotTotal), maxBilledTokens)
	c.cached = min(c.cached, c.input)
	c.cacheWrite = min(c.cacheWrite, c.input-c.cached)
	c.audioInput = min(c.audioInput, c.input)
	c.reasoning = min(c.reasoning, c.output)
	c.audioOutput = min(c.audioOutput, c.output)
	u.counts, u.details = c, f.details(&c)
	return u
}

// cacheWrites returns the tokens that were written to the cache. Some gateways send only the parts.
func (f *usageFields) cacheWrites() int64 {
	whole := func(n func(slot) int64) int64 {
		return max(n(slotCacheWrite), max(n(slotCacheWrite5m), 0)+max(n(slotCacheWrite1h), 0), 0)
	}
	return whole(func(s slot) int64 { return f.n[s] }) + whole(func(s slot) int64 { return f.beside[s] })
}

// details returns the parts of c that have prices of their own, none larger than its whole.
func (f *usageFields) details(c *tokenCounts) usageDetails {
	at := func(s slot, whole int64) int64 { return min(max(f.n[s], 0), whole) }
	d := usageDetails{
		cacheWrite1h: min(max(f.n[slotCacheWrite1h], 0)+f.beside[slotCacheWrite1h], c.cacheWrite),
		cachedAudio:  at(slotCachedAudio, c.cached), cachedImage: at(slotCachedImage, c.cached),
		imageInput: at(slotImageInput, c.input), imageOutput: at(slotImageOutput, c.output),
		webSearches: max(f.n[slotWebSearches], 0), searchSources: max(f.n[slotSearchSources], 0),
	}
	if f.n[slotCitations] >= 0 { // Perplexity counts what was read and thought beside the others
		c.input += f.n[slotCitations]
		thoughts := max(f.n[slotReasoningBeside], 0)
		c.output, c.reasoning = c.output+thoughts, c.reasoning+thoughts
	}
	return d
}

// hasOutputDetails reports whether the object says which kinds of tokens the output is.
func (f *usageFields) hasOutputDetails() bool {
	return f.n[slotImageOutput] >= 0 || f.n[slotAudioOutput] >= 0 || f.n[slotReasoning] >= 0
}

// parseMilliseconds reads a number of seconds, and returns milliseconds; 0 for what is no time of one call.
func parseMilliseconds(text []byte) int64 {
	v, err := strconv.ParseFloat(string(bytes.TrimSpace(text)), 64)
	if err != nil || !(v > 0 && v <= 1_000_000) {
		return 0
	}
	return int64(math.Round(v * 1000))
}

// A pictureList is what an answer says of its pictures.
type pictureList struct {
	count         int64
	size, quality string // "": it does not say
}

func (l *pictureList) set(s slot, text []byte) {
	target := &l.size
	if s == slotQuality {
		target = &l.quality
	}
	*target = string(text[:min(len(text), maxPictureField)])
}

// mediaSlot is slotFor in an answer with pictures, or in a transcript.
func mediaSlot(name []byte) slot {
	switch string(name) {
	case "data":
		return slotPictures
	case "size":
		return slotSize
	case "quality":
		return slotQuality
	case "duration":
		return slotDuration
	}
	return slotNone
}

// withBeside adds the output of iterations to a count that may be missing or invalid.
func withBeside(out, beside int64) int64 {
	if out < 0 {
		return out
	}
	return out + beside
}

// splitTotal returns input and output as far as they are known, with what the total has beyond them. xAI and
// Gemini count thoughts only there. Gateways that translate Anthropic's usage count cached tokens only there.
func (f *usageFields) splitTotal(kind meterKind) (in, out int64) {
	in, out = f.n[slotInput], f.n[slotOutput]
	total := f.n[slotTotal]
	if kind == meterEmbeddings {
		if in <= 0 {
			in = total
		}
		return in, 0
	}
	if in <= 0 && out > 0 && total > out { // only the input is missing
		in = total - out
	}
	rest := total - max(in, 0) - max(out, 0)
	if rest <= 0 || in <= 0 && out <= 0 {
		return in, out
	}
	cached, cacheWrite := max(f.n[slotCached], 0), max(f.n[slotCacheWrite], 0)
	if rest == cached || rest == cacheWrite || rest == cached+cacheWrite {
		if reasoning := f.n[slotReasoning]; rest != reasoning {
			return in + rest, out
		}
	}
	return in, max(out, 0) + rest
}

// splitGemini returns input and output as Gemini's own API counts them: thoughts are output beside that of the
// candidates, and what tools have read is input beside that of the prompt. The total tells a count that is missing.
func (f *usageFields) splitGemini() (in, out int64) {
	in, out = f.n[slotInput], f.n[slotOutput]
	total := f.n[slotTotal]
	if thoughts := f.n[slotReasoning]; thoughts > 0 && (in <= 0 || out <= 0 || total != in+out) {
		out = max(out, 0) + thoughts
	}
	if tools := f.n[slotToolInput]; tools > 0 {
		in = max(in, 0) + tools
	}
	switch {
	case in <= 0 && out > 0 && total > out:
		in = total - out
	case in > 0 && total > in+max(out, 0):
		out = total - in
	}
	return in, out
}

// countsSearches reports whether an answer of Gemini's API says how often it has searched the web.
func (m *meter) countsSearches() bool {
	return m.usage.n[slotWebSearches] >= 0 || m.scan.candidates && m.done
}

// searchQueries are the searches of the web that an answer of Gemini's API names. It names them in each event of a
// stream, so each counts once.
type searchQueries struct {
	count int64
	seen  [32]uint32 // hashes; more than these are not compared
}

// add counts a query, as it is in JSON. Empty ones are not billed.
func (q *searchQueries) add(text []byte) {
	if len(bytes.TrimSpace(text)) == 0 {
		return
	}
	h := fnv.New32a()
	h.Write(text[:min(len(text), maxReportedModelLen)]) // of a text that comes in pieces, no more is kept
	n := min(int(q.count), len(q.seen))
	if slices.Contains(q.seen[:n], h.Sum32()) {
		return
	}
	if n < len(q.seen) {
		q.seen[n] = h.Sum32()
	}
	q.count++
}

// billedByGoogle returns how many of an answer's searches are billed: each, or with Gemini 2.5 and earlier one for all.
func billedByGoogle(searches int64, model string) int64 {
	if model = model[strings.LastIndexByte(model, '/')+1:]; strings.HasPrefix(model, "gemini-1") ||
		strings.HasPrefix(model, "gemini-2") {
		return min(searches, 1)
	}
	return searches
}

// A modalityPart is an element of the lists in which Gemini's API counts the tokens or calls of each kind.
type modalityPart struct {
	kind   modality
	tokens int64
}

type modality uint8

const (
	modalityOther modality = iota
	modalityAudio
	modalityImage
	modalitySearch // of the web, counted in calls
)

func modalityOf(text []byte) modality {
	switch string(text) {
	case "AUDIO", "audio":
		return modalityAudio
	case "IMAGE", "image":
		return modalityImage
	case "google_search":
		return modalitySearch
	}
	return modalityOther
}

// addPart adds an element of a list to the count of its kind.
func (f *usageFields) addPart(list slot, part modalityPart) {
	type key struct {
		list slot
		kind modality
	}
	switch (key{list, part.kind}) {
	case key{slotInputDetails, modalityAudio}:
		f.setMax(slotAudioInput, part.tokens)
	case key{slotInputDetails, modalityImage}:
		f.setMax(slotImageInput, part.tokens)
	case key{slotOutputDetails, modalityAudio}:
		f.setMax(slotAudioOutput, part.tokens)
	case key{slotOutputDetails, modalityImage}:
		f.setMax(slotImageOutput, part.tokens)
	case key{slotCachedDetails, modalityAudio}:
		f.setMax(slotCachedAudio, part.tokens)
	case key{slotGroundingCounts, modalitySearch}:
		f.setMax(slotWebSearches, part.tokens)
	case key{slotCachedDetails, modalityImage}:
		f.setMax(slotCachedImage, part.tokens)
	}
}

// A responseStatus is how far a stored response has come.
type responseStatus uint8

const (
	responseUnknown responseStatus = iota
	responseRunning                // queued or in_progress
	responseFailed
	responseEnded // completed, cancelled, incomplete
)

func responseStatusOf(text []byte) responseStatus {
	switch string(text) {
	case "queued", "in_progress":
		return responseRunning
	case "failed":
		return responseFailed
	case "completed", "cancelled", "incomplete":
		return responseEnded
	}
	return responseUnknown
}

// isList reports whether the slot is for a list whose elements matter. The details of counts may also be objects.
func (s slot) isList() bool {
	switch s {
	case slotChoices, slotIterations, slotOutputList, slotCandidates, slotInputDetails, slotOutputDetails,
		slotCachedDetails, slotPictures, slotQueries, slotGroundingCounts:
		return true
	}
	return false
}

// A textName is the name of a member whose string is text of the model.
type textName uint8

const (
	textNone textName = iota
	textContent
	textArguments
	textDelta
	textRefusal
	textTranscript
	textValue
	textPlain // the ones from here on may repeat each other
	textReasoning
	textReasoningContent
	textThinking
	numTextNames
)

func textNameOf(name []byte) textName {
	switch string(name) {
	case "content":
		return textContent
	case "arguments", "partial_json", "input":
		return textArguments
	case "delta":
		return textDelta
	case "refusal":
		return textRefusal
	case "transcript":
		return textTranscript
	case "value":
		return textValue
	case "text":
		return textPlain
	case "reasoning":
		return textReasoning
	case "reasoning_content":
		return textReasoningContent
	case "thinking":
		return textThinking
	}
	return textNone
}

// maxTextName is the length of the longest name in textNameOf.
const maxTextName = len("reasoning_content")

// A textCounter counts the bytes of text in one JSON document: the strings that are values of members with a
// textName. The zero value is ready. Give it a document by feed, in pieces of any size, or member by member by
// readMember: for valid JSON, the result is the same.
type textCounter struct {
	sums [numTextNames]int64

	inString  bool
	escaped   bool     // in a string, the last byte was a backslash
	afterName bool     // the last string was the name of the value that comes now
	member    textName // of the string that is being read, if it is a value
	start     [maxTextName + 1]byte
	startLen  int // of the last string, as far as it fits, unless it was a value with a member
	stringLen int64
}

// feed reads the next bytes of the document.
func (t *textCounter) feed(p []byte) {
	for i := 0; i < len(p); {
		if !t.inString {
			quote := indexFrom(p, i, '"')
			for last := quote - 1; last >= i; last-- { // nearly always one step: what comes before the string decides
				if c := p[last]; c > ' ' {
					t.afterName = c == ':'
					break
				}
			}
			if i = quote + 1; quote == len(p) {
				return
			}
			if t.member = textNone; t.afterName {
				t.member = textNameOf(t.start[:t.startLen])
			}
			t.inString, t.afterName, t.startLen, t.stringLen = true, false, 0, 0
		}
		from := i
		var closed bool
		if i, closed = stringEnd(p, i, &t.escaped); !closed {
			t.readString(p[from:])
			return
		}
		t.readString(p[from : i-1])
		t.sums[t.member] += t.stringLen
		t.inString = false
	}
}

// readString reads a piece of a string.
func (t *textCounter) readString(p []byte) {
	if t.member != textNone {
		t.stringLen += int64(len(p))
	} else if t.startLen < len(t.start) {
		t.startLen += copy(t.start[t.startLen:], p)
	}
}

// readMember reads the member of the document in data whose name ends before data[quote], and whose colon is at
// data[colon]. It returns the index of the last byte that it has read.
func (t *textCounter) readMember(data []byte, quote, colon int) int {
	from := bytes.LastIndexByte(data[max(0, quote-maxTextName-1):quote], '"')
	if from += max(0, quote-maxTextName-1) + 1; from < 2 || data[from-2] == '\\' { // in a string
		return colon
	}
	name := textNameOf(data[from:quote])
	at := colon + 1
	for at < len(data) && data[at] <= ' ' {
		at++
	}
	if name == textNone || at == len(data) || data[at] != '"' {
		return colon
	}
	var escaped bool
	end, closed := stringEnd(data, at+1, &escaped)
	if !closed {
		return len(data) - 1
	}
	t.sums[name] += int64(end - 1 - (at + 1))
	return end - 1
}

// sum returns the bytes of text in the document.
func (t *textCounter) sum() (n int64) {
	for _, sum := range t.sums[textNone+1 : textPlain] {
		n += sum
	}
	var thoughts int64 // gateways send the same thought under two names
	for _, sum := range t.sums[textPlain:] {
		thoughts = max(thoughts, sum)
	}
	return n + thoughts
}

// usageSlot is slotFor in a usage object or an iteration.
func usageSlot(name []byte) slot {
	switch string(name) {
	case "prompt_tokens", "input_tokens", "promptTokenCount", "total_input_tokens":
		return slotInput
	case "completion_tokens", "output_tokens", "candidatesTokenCount", "total_output_tokens":
		return slotOutput
	case "cache_read_input_tokens", "prompt_cache_hit_tokens", "cached_tokens", // Anthropic, DeepSeek, Moonshot
		"cachedContentTokenCount", "total_cached_tokens": // Gemini, like the next two
		return slotCached
	case "thoughtsTokenCount", "total_thought_tokens":
		return slotReasoning
	case "toolUsePromptTokenCount", "total_tool_use_tokens":
		return slotToolInput
	case "cache_creation_input_tokens":
		return slotCacheWrite
	case "total_tokens", "totalTokenCount":
		return slotTotal
	case "iterations":
		return slotIterations
	case "seconds":
		return slotSeconds
	case "cache_creation":
		return slotCacheCreation
	case "server_tool_use":
		return slotServerTools
	case "service_tier":
		return slotServiceTier
	case "speed":
		return slotSpeed
	case "inference_geo":
		return slotRegion
	case "search_context_size": // Perplexity, like the next ones
		return slotSearchContext
	case "grounding_tool_count": // Gemini's interactions
		return slotGroundingCounts
	case "num_search_queries":
		return slotWebSearches
	case "num_sources_used": // xAI
		return slotSearchSources
	case "citation_tokens":
		return slotCitations
	case "reasoning_tokens":
		return slotReasoningBeside
	case "cacheTokensDetails", "cached_tokens_by_modality":
		return slotCachedDetails
	case "prompt_tokens_details", "input_tokens_details", "input_token_details", "promptTokensDetails",
		"input_tokens_by_modality":
		return slotInputDetails
	case "completion_tokens_details", "output_tokens_details", "output_token_details", "candidatesTokensDetails",
		"output_tokens_by_modality":
		return slotOutputDetails
	}
	return slotNone
}

// itemSlot is slotFor in an item of output, or in its action.
func itemSlot(in jsonScope, name []byte) slot {
	switch string(name) {
	case "type":
		if in == scopeAction {
			return slotActionType
		}
		return slotItemType
	case "action":
		if in == scopeItem {
			return slotItemAction
		}
	case "container_id":
		return slotContainer
	}
	return slotNone
}

// detailSlot is slotFor in the objects within usage.
func detailSlot(in jsonScope, name []byte) slot {
	type member struct {
		in   jsonScope
		name string
	}
	switch (member{in, string(name)}) {
	case member{scopeInputDetails, "cached_tokens"}:
		return slotCached
	case member{scopeInputDetails, "cache_write_tokens"}, member{scopeInputDetails, "cache_creation_tokens"},
		member{scopeInputDetails, "cache_creation_input_tokens"}:
		return slotCacheWrite
	case member{scopeInputDetails, "audio_tokens"}:
		return slotAudioInput
	case member{scopeInputDetails, "image_tokens"}:
		return slotImageInput
	case member{scopeInputDetails, "cached_tokens_details"}:
		return slotCachedDetails
	case member{scopeCachedDetails, "audio_tokens"}:
		return slotCachedAudio
	case member{scopeCachedDetails, "image_tokens"}:
		return slotCachedImage
	case member{scopeOutputDetails, "reasoning_tokens"}:
		return slotReasoning
	case member{scopeOutputDetails, "audio_tokens"}:
		return slotAudioOutput
	case member{scopeOutputDetails, "image_tokens"}:
		return slotImageOutput
	case member{scopeCacheCreation, "ephemeral_5m_input_tokens"}:
		return slotCacheWrite5m
	case member{scopeCacheCreation, "ephemeral_1h_input_tokens"}:
		return slotCacheWrite1h
	case member{scopeModality, "modality"}, member{scopeModality, "type"}:
		return slotModality
	case member{scopeModality, "tokenCount"}, member{scopeModality, "tokens"}, member{scopeModality, "count"}:
		return slotModalityCount
	case member{scopeCandidate, "finishReason"}, member{scopeFeedback, "blockReason"}:
		return slotFinish
	case member{scopeCandidate, "groundingMetadata"}:
		return slotGrounding
	case member{scopeGrounding, "webSearchQueries"}, member{scopeGrounding, "imageSearchQueries"}:
		return slotQueries
	case member{scopeServerTools, "web_search_requests"}:
		return slotWebSearches
	}
	return slotNone
}

// showsBatch reports whether an answer of the endpoint shows batches of whose ids the proxy remembers who made them, or
// which files have their results.
func (e *endpoint) showsBatch() bool {
	return strings.HasPrefix(e.pattern, "/v1/batches") || e.name() == "POST /v1/messages/batches"
}

// makesBatch reports whether a call of the endpoint makes a batch.
func (e *endpoint) makesBatch() bool {
	return e.method == "POST" && e.showsBatch() && !strings.Contains(e.pattern, "{")
}

// hasResults reports whether an answer of the endpoint may be the results of a batch. Other files have another form.
func (e *endpoint) hasResults() bool {
	return e.pattern == "/v1/files/{file_id}/content" || e.pattern == "/v1/messages/batches/{message_batch_id}/results"
}
