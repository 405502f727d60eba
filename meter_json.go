// This file finds the few members of a JSON document that a meter needs, whatever the document's size and
// however it is cut into pieces: top-level usage, model, type, error, choices, output and service_tier, and in a
// stream those of `response` or `message`. It keeps no more than one short string. It does not validate: a broken
// document yields less, never a panic. Names are compared as written; an escaped name is a different name.
//
// usageScanner is a state machine with one state per position in a document:
//
//	scanStart  "{" leads to scanKey; "[" (a list of results) is skipped
//	scanKey    a quote leads to scanName, "}" ends the object
//	scanName   its closing quote leads to scanColon; slotFor then says what the member is for
//	scanColon  ":" leads to scanValue
//	scanValue  the first byte of the value decides: scanString, scanScalar, scanFirst for the list of choices,
//	           scanKey for an object whose members matter (pushed on scopes), scanSkip for any other
//	scanSkip   counts brackets up to the end of the value; scanSkipText is a string in it
//	scanAfter  "," leads to scanKey, "}" ends the object
//	scanNext   after an element of choices or iterations: "," leads to scanElement, "]" to scanAfter
//	scanError  is scanSkip for an error, which may be empty; scanErrorText is a string in it
//	scanClosed the document ended; scanBroken: it is not JSON, the rest is ignored
package main

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// A slot says what the value being read is for. The first ones are indexes of usageFields.
type slot uint8

const (
	slotNone slot = iota
	slotInput
	slotOutput
	slotCached
	slotCacheWrite
	slotCacheWrite5m
	slotCacheWrite1h // the last one that iterations have
	slotReasoning
	slotReasoningBeside // what only counts beside citation tokens
	slotAudioInput
	slotAudioOutput
	slotImageInput
	slotImageOutput
	slotCachedAudio
	slotCachedImage
	slotCitations
	slotWebSearches
	slotSearchSources
	slotToolInput // what tools have read, beside slotInput
	slotTotal
	numCountSlots // the slots above are counts
	slotUsage
	slotModel
	slotType
	slotError
	slotChoices
	slotNested
	slotInputDetails
	slotOutputDetails
	slotSeconds
	slotTopLevelInput
	slotStatus
	slotVendor     // an object of one provider that may have usage
	slotWords      // a string that says what went wrong, if the document is no answer
	slotAnswer     // a member of an answer
	slotFailure    // beside error, another value that says that there is one
	slotSuccess    // false says that there is an error
	slotKind       // "error" says so
	slotBaseResp   // an object with the status of the answer
	slotIterations // a list in usage
	slotIterationType
	slotID
	slotCacheCreation
	slotCachedDetails
	slotServerTools
	slotServiceTier
	slotSpeed
	slotRegion
	slotSearchContext
	slotOutputList // the list of items in a response
	slotItemType
	slotItemAction
	slotActionType
	slotContainer
	slotCandidates
	slotGrounding // an object of a candidate that says what it rests on
	slotQueries   // a list of searches in it
	slotQuery     // an element of that
	slotGroundingCounts
	slotFeedback // an object that says why there are no candidates
	slotFinish
	slotModality
	slotModalityCount
	slotCustomID // of a line in the results of a batch
	slotData
	slotItem     // of an event that shows one item of a response
	slotPictures // the list of pictures in an answer
	slotSize     // of these, like the next
	slotQuality
	slotDuration // of sound, where the answer is a transcript
)

// A jsonScope is an object whose members matter.
type jsonScope uint8

const (
	scopeTop jsonScope = iota
	scopeNested
	scopeUsage
	scopeInputDetails
	scopeOutputDetails
	scopeChoice    // an element of choices, or of pictures
	scopeVendor    // an object that may have usage: x_groq, or result
	scopeBaseResp  // base_resp of MiniMax
	scopeIteration // an element of usage.iterations
	scopeCacheCreation
	scopeCachedDetails
	scopeServerTools
	scopeItem      // an element of output
	scopeAction    // of an item: what a tool did
	scopeModality  // an element of the details of Gemini's counts
	scopeCandidate // an element of candidates
	scopeGrounding // of a candidate
	scopeFeedback  // promptFeedback
)

type scanState uint8

const (
	scanStart     scanState = iota // before the document
	scanKey                        // in a known object, before a name or the closing brace
	scanName                       // in a name
	scanColon                      // after a name
	scanValue                      // before a value
	scanString                     // in a string value
	scanScalar                     // in a number or literal
	scanFirst                      // after the [ of a list of objects that matter
	scanElement                    // after a comma in it
	scanNext                       // after an element of it
	scanError                      // in an error that is an object or a list
	scanErrorText                  // in a string in it
	scanSkip                       // in a value that is not needed
	scanSkipText                   // in a string of such a value
	scanAfter                      // after a value
	scanClosed                     // after the document
	scanBroken                     // not JSON
)

// A usageScanner reads one document after the other, each in pieces of any size.
type usageScanner struct {
	model string // the first one found; reset keeps it

	usage         usageFields // of the last usage object; complete if usageSeen
	usageSeen     bool
	usageNested   bool // usage is response.usage or message.usage
	usageInner    bool // usage is choices[].usage or x_groq.usage
	choicesEmpty  bool // choices is []
	hasError      bool // error says something: it is not null, "", false, {}, or made of these
	hasFailure    bool // another member says that there is an error
	hasWords      bool // a message is at the top level
	hasAnswer     bool // so is a part of an answer
	statusFailed  bool // status is "failed", at the top level or nested
	topLevelInput bool // input_tokens is at the top level
	eventType     eventType
	typeSeen      bool // type is a string
	typeIsDelta   bool // that says delta
	finished      bool // a candidate of Gemini's API is complete, or the prompt was refused

	readID bool           // read id and status, which reset keeps
	status responseStatus // of the response that the documents are about
	id     [128]byte      // of that response
	idLen  int

	tools      toolCounts    // of the document
	item       outputItem    // the current element of output, or the item of an event
	inEvent    bool          // it is the latter
	media      bool          // the answer is sound, pictures or a transcript
	pictures   pictureList   // in the answer
	durationMS int64         // of its sound
	part       modalityPart  // the current element of the details of Gemini's counts
	queries    searchQueries // in all documents, like the next
	candidates bool          // a list of candidates was seen
	conditions usageDetails  // the last tier, speed, region and search context; reset keeps them

	readNested bool // look into response and message, too
	batch      bool // the document is a line in the results of a batch
	isResult   bool // it has a custom_id
	hasData    bool // its answer has a list named data: pictures or embeddings
	state      scanState
	slot       slot
	escaped    bool // in a string, the last byte was a backslash
	level      uint8
	scopes     [6]jsonScope          // the known objects around the current position; level is their number
	list       slot                  // the last list of objects that was entered
	depth      int                   // open brackets in a skipped value
	number     [maxCountLen + 1]byte // the number or literal so far, as far as it fits
	numberLen  int
	iteration  usageFields // of the current element of usage.iterations
	billed     bool        // it is billed beside the counts of usage
	errorText  bool        // in an error, the last string was not empty, and may be a value
	text       []byte      // of a string that came in pieces, as far as it fits
	length     int         // of that string; more than maxReportedModelLen if it did not fit
}

// reset prepares s for the next document.
func (s *usageScanner) reset(readNested bool) {
	s.usageSeen, s.usageNested, s.usageInner, s.choicesEmpty = false, false, false, false
	s.hasFailure, s.hasWords, s.hasAnswer = false, false, false
	s.hasError, s.statusFailed, s.topLevelInput, s.finished = false, false, false, false
	s.eventType, s.typeSeen, s.typeIsDelta = eventNone, false, false
	s.readNested, s.state, s.level, s.depth, s.escaped = readNested, scanStart, 0, 0, false
	s.tools, s.isResult, s.hasData = toolCounts{}, false, false
	s.item, s.inEvent = outputItem{}, false
}

// feedAll reads the next bytes of a document that nothing follows.
func (s *usageScanner) feedAll(p []byte) {
	for len(p) > 0 {
		p = p[s.feed(p):]
	}
}

// feed reads the next bytes of the document and returns how many of them it has read: all, or up to the
// document's end.
func (s *usageScanner) feed(p []byte) int {
	for i := 0; i < len(p); {
		switch s.state {
		case scanSkip:
			i = s.skip(p, i)
		case scanSkipText:
			var closed bool
			if i, closed = stringEnd(p, i, &s.escaped); closed {
				s.state = scanSkip
			}
		case scanError:
			i = s.skipError(p, i)
		case scanErrorText:
			from := i
			var closed bool
			if i, closed = stringEnd(p, i, &s.escaped); closed {
				s.state = scanError
			}
			s.errorText = s.errorText || i-from > 1 || !closed
		case scanName, scanString:
			from := i
			var closed bool
			if i, closed = stringEnd(p, i, &s.escaped); !closed {
				s.bufferText(p[from:i])
				continue
			}
			text := p[from : i-1]
			if s.length > 0 { // it started in an earlier piece
				s.bufferText(text)
				text = s.text[:min(s.length, maxReportedModelLen)]
			}
			if s.state == scanName {
				s.slot, s.state = s.slotFor(text), scanColon
				s.discardEarlier()
			} else {
				s.state = scanAfter
				s.setString(text, max(s.length, len(text)) > maxReportedModelLen)
			}
		case scanScalar:
			i = s.readScalar(p, i)
		case scanBroken:
			return len(p)
		default:
			s.readByte(p[i])
			i++
		}
		if s.state == scanClosed {
			return i
		}
	}
	return len(p)
}

// readByte reads one byte outside of strings, numbers and skipped values.
func (s *usageScanner) readByte(c byte) {
	if c == ' ' || c == '\n' || c == '\r' || c == '\t' {
		return
	}
	switch {
	case s.state == scanValue:
		s.startValue(c)
	case s.state == scanKey && c == '"':
		s.state, s.length = scanName, 0
	case s.state == scanColon && c == ':':
		s.state = scanValue
	case s.state == scanAfter && c == ',' && s.level > 0:
		s.state = scanKey
	case (s.state == scanAfter || s.state == scanKey) && c == '}' && s.level > 0:
		s.leaveObject()
	case s.state == scanFirst && c == ']':
		s.choicesEmpty = s.choicesEmpty || s.slot == slotChoices
		s.state = scanAfter
	case s.state == scanNext && c == ']':
		s.state = scanAfter
	case s.state == scanNext && c == ',':
		s.state = scanElement
	case (s.state == scanFirst || s.state == scanElement) && c == '{':
		s.enterElement()
	case (s.state == scanFirst || s.state == scanElement) && c == '"' && s.list == slotQueries:
		s.slot, s.state, s.length = slotQuery, scanString, 0
	case s.state == scanFirst || s.state == scanElement:
		s.depth, s.state = 1, scanSkip
		s.skip([]byte{c}, 0)
	case s.state == scanStart && c == '{':
		s.enterObject(scopeTop)
	case s.state == scanStart && c == '[':
		s.slot, s.depth, s.state = slotNone, 1, scanSkip
	case s.state == scanStart && (c == 0xEF || c == 0xBB || c == 0xBF): // byte order mark
	default:
		s.state = scanBroken
	}
}

// startValue reads the first byte of a value in a known object.
func (s *usageScanner) startValue(c byte) {
	switch c {
	case '"':
		s.state, s.length = scanString, 0
	case '{', '[':
		s.startContainer(c)
	case ',', ':', '}', ']':
		s.state = scanBroken
	default:
		s.startScalar(c)
		s.state, s.numberLen = scanScalar, 1
		s.number[0] = c
	}
}

// startScalar reads the first byte of a number or literal.
func (s *usageScanner) startScalar(c byte) {
	switch s.slot {
	case slotError:
		s.hasError = saysSomething(c)
	case slotFailure:
		s.hasFailure = s.hasFailure || saysSomething(c)
	case slotSuccess:
		s.hasFailure = s.hasFailure || c == 'f'
	}
}

// startContainer enters an object or a list, or starts to skip it.
func (s *usageScanner) startContainer(open byte) {
	object := open == '{'
	s.hasAnswer = s.hasAnswer || s.level == 1 && s.slot.isAnswer()
	switch {
	case object && s.slot == slotUsage && !(s.usageSeen && !s.usageInner && s.isInner()):
		s.usage.clear()
		s.usageNested, s.usageInner = s.scopes[s.level-1] == scopeNested, s.isInner()
		s.enterObject(scopeUsage)
	case object && s.slot == slotVendor:
		s.enterObject(scopeVendor)
	case object && s.slot == slotFeedback:
		s.enterObject(scopeFeedback)
	case object && s.slot == slotGrounding:
		s.enterObject(scopeGrounding)
	case s.slot == slotError || s.slot == slotFailure:
		s.depth, s.errorText, s.state = 1, false, scanError
	case object && s.slot == slotBaseResp:
		s.enterObject(scopeBaseResp)
	case object && s.slot == slotNested:
		s.enterObject(scopeNested)
	case object && s.slot == slotInputDetails:
		s.enterObject(scopeInputDetails)
	case object && s.slot == slotOutputDetails:
		s.enterObject(scopeOutputDetails)
	case object && s.slot == slotCacheCreation:
		s.enterObject(scopeCacheCreation)
	case object && s.slot == slotCachedDetails:
		s.enterObject(scopeCachedDetails)
	case object && s.slot == slotServerTools:
		s.enterObject(scopeServerTools)
	case object && s.slot == slotItemAction:
		s.enterObject(scopeAction)
	case object && s.slot == slotItem:
		s.inEvent = true
		s.enterObject(scopeItem)
	case !object && s.slot == slotData:
		s.hasData, s.depth, s.state = true, 1, scanSkip
	case !object && s.slot.isList():
		s.state, s.list = scanFirst, s.slot
	default:
		s.setCount(countInvalid)
		s.depth, s.state = 1, scanSkip
	}
}

// enterObject enters an object whose members matter. slotFor nests scopes at most six deep.
func (s *usageScanner) enterObject(sc jsonScope) {
	s.scopes[s.level] = sc
	s.level++
	s.state = scanKey
}

// enterElement enters an element of a list that matters.
func (s *usageScanner) enterElement() {
	switch s.list {
	case slotIterations:
		s.iteration.clear()
		s.billed = false
		s.enterObject(scopeIteration)
	case slotOutputList:
		s.item = outputItem{}
		s.enterObject(scopeItem)
	case slotCandidates:
		s.candidates = true
		s.enterObject(scopeCandidate)
	case slotQueries: // not a list of texts
		s.depth, s.state = 2, scanSkip
	case slotInputDetails, slotOutputDetails, slotCachedDetails, slotGroundingCounts:
		s.part = modalityPart{}
		s.enterObject(scopeModality)
	default:
		s.enterObject(scopeChoice)
	}
}

func (s *usageScanner) leaveObject() {
	s.level--
	s.state = scanAfter
	switch s.scopes[s.level] {
	case scopeUsage:
		s.usageSeen = true
	case scopeCandidate:
		s.state, s.list = scanNext, slotCandidates
	case scopeChoice:
		if s.state = scanNext; s.list == slotPictures {
			s.pictures.count++
		}
	case scopeModality:
		s.state = scanNext
		s.usage.addPart(s.list, s.part)
	case scopeItem:
		if s.tools.add(&s.item); !s.inEvent {
			s.state = scanNext
		}
	case scopeIteration:
		if s.state = scanNext; s.billed {
			s.usage.addBeside(&s.iteration)
		}
	}
	if s.level == 0 {
		s.state = scanClosed
	}
}

// isInner reports whether the innermost known object is one whose usage counts only if there is no other.
func (s *usageScanner) isInner() bool {
	in := s.scopes[s.level-1]
	return in == scopeChoice || in == scopeVendor
}

// saysSomething reports whether a number or literal that starts with c, in an error, says that there is one.
func saysSomething(c byte) bool { return c == 't' || c >= '1' && c <= '9' }

// skipError passes over an error from p[i], outside of its strings, and returns where it stopped. Members that
// are all empty say nothing: some providers send them with every answer.
func (s *usageScanner) skipError(p []byte, i int) int {
	for ; i < len(p); i++ {
		switch c := p[i]; c {
		case '"':
			s.state, s.errorText = scanErrorText, false
			return i + 1
		case ':':
			s.errorText = false // it was a name
		case '{', '[':
			s.depth++
		case ',', '}', ']':
			if s.errorText {
				s.setError()
			}
			if s.errorText = false; c == ',' {
				continue
			}
			if s.depth--; s.depth == 0 {
				s.state = scanAfter
				return i + 1
			}
		default:
			if saysSomething(c) {
				s.setError()
			}
		}
	}
	return i
}

// skip passes over a value that is not needed, from p[i], and returns where it stopped. Embeddings are a
// megabyte of numbers, so what follows a comma is read in larger steps.
func (s *usageScanner) skip(p []byte, i int) int {
	for ; i < len(p); i++ {
		switch c := p[i]; {
		case c == '"':
			s.state = scanSkipText
			return i + 1
		case c == ',':
			i += numbersLen(p[i+1:])
		case c < '[': // digits, signs, spaces, capitals
		case c|0x20 == '{': // [ and { are one bit apart
			s.depth++
		case c|0x20 == '}':
			if s.depth--; s.depth == 0 {
				s.state = scanAfter
				if s.level == 0 {
					s.state = scanClosed
				}
				return i + 1
			}
		}
	}
	return i
}

// numbersLen counts leading bytes that are neither a quote nor above '?', as in lists of numbers, but perhaps not all.
func numbersLen(b []byte) (n int) {
	for ; n < min(len(b), 16); n++ {
		if c := b[n]; c == '"' || c > '?' {
			return n
		}
	}
	list := b[:min(len(b), 2<<10)]
	for list = list[n:indexFrom(list, n, '"')]; len(list) >= 32; list, n = list[32:], n+32 {
		all := binary.LittleEndian.Uint64(list) | binary.LittleEndian.Uint64(list[8:]) |
			binary.LittleEndian.Uint64(list[16:]) | binary.LittleEndian.Uint64(list[24:])
		if (all|all<<1)&0x8080808080808080 != 0 { // a byte has one of its two highest bits: it is above '?'
			break
		}
	}
	return n
}

// stringEnd returns the index after the closing quote of the string that p[i:] is in, or len(p), false. Names
// are short and prose is full of escapes, so it looks at 32 bytes at first. After 32 plain bytes the string is
// more likely base64, where searching for the next quote is faster. escaped says whether the byte before was a
// backslash that escapes the next one; it starts as false.
func stringEnd(p []byte, i int, escaped *bool) (int, bool) {
	if *escaped && i < len(p) {
		*escaped = false
		i++
	}
	quote := -1 // the next quote, or before i if it must be searched for
	for i < len(p) {
		near := p[i:min(i+32, len(p))]
		n := plainLen(near)
		for n < len(near) && near[n] < ' ' { // not valid in a string, but this is not a validator
			n++
			n += plainLen(near[n:])
		}
		if i += n; n == len(near) {
			if quote < i {
				quote = indexFrom(p, i, '"')
			}
			if i = indexFrom(p[:quote], i, '\\'); i == len(p) {
				break
			}
		}
		if p[i] == '"' {
			return i + 1, true
		}
		i += 2
	}
	*escaped = i > len(p)
	return len(p), false
}

// readScalar reads a number or literal from p[i] and returns the index of the byte after it.
func (s *usageScanner) readScalar(p []byte, i int) int {
	for ; i < len(p); i++ {
		switch c := p[i]; c {
		case ',', '}', ']', ' ', '\n', '\r', '\t':
			if s.number[0] != 'n' { // null
				s.setNumber(s.number[:s.numberLen])
			}
			s.state = scanAfter
			return i
		default:
			if s.numberLen < len(s.number) {
				s.number[s.numberLen] = c
				s.numberLen++
			}
		}
	}
	return i
}

// setNumber stores a number that may be in quotes.
func (s *usageScanner) setNumber(text []byte) {
	switch s.slot {
	case slotSeconds:
		s.usage.byDuration, s.usage.inputMS = true, parseMilliseconds(text)
		return
	case slotDuration:
		s.durationMS = parseMilliseconds(text)
		return
	}
	s.setCount(parseTokenCount(text))
}

// setCount stores the value of a slot that holds a count.
func (s *usageScanner) setCount(v int64) {
	switch {
	case s.slot > slotNone && s.slot <= slotCacheWrite1h && slices.Contains(s.scopes[:s.level], scopeIteration):
		s.iteration.setMax(s.slot, v)
	case s.slot > slotNone && s.slot < numCountSlots:
		s.usage.setMax(s.slot, v)
	case s.slot == slotModalityCount:
		s.part.tokens = v
	case s.slot == slotTopLevelInput:
		s.topLevelInput = v >= 0
	}
}

// setString stores the value of a slot that holds a string.
func (s *usageScanner) setString(text []byte, tooLong bool) {
	switch s.slot {
	case slotModel:
		if s.model == "" && !tooLong {
			s.model = sanitizeModelName(text)
		}
	case slotType:
		s.eventType = eventOther
		if !tooLong {
			s.eventType = eventTypeOf(text)
		}
		s.typeSeen, s.typeIsDelta = true, bytes.Contains(text, []byte("delta"))
	case slotError:
		s.hasError = len(text) > 0
	case slotFailure:
		s.hasFailure = s.hasFailure || len(text) > 0
	case slotKind:
		s.hasFailure = s.hasFailure || string(text) == "error"
	case slotWords, slotNested, slotVendor:
		s.hasWords = s.hasWords || len(text) > 0 && s.level == 1
	case slotAnswer:
		s.hasAnswer = true
	case slotStatus:
		status := responseStatusOf(text)
		s.statusFailed = status == responseFailed
		if status != responseUnknown {
			s.status = status
		}
	case slotID:
		if s.idLen = 0; !tooLong && len(text) <= len(s.id) {
			s.idLen = copy(s.id[:], text)
		}
	case slotIterationType:
		// Others are in the top-level counts, or are declined and not billed.
		s.billed = string(text) == "compaction" || string(text) == "advisor_message"
	case slotServiceTier:
		s.conditions.tier = serviceTierOf(text)
	case slotSpeed:
		s.conditions.speed = inferenceSpeedOf(text)
	case slotRegion:
		s.conditions.region = inferenceRegionOf(text)
	case slotSearchContext:
		s.conditions.searchContext = searchContextOf(text)
	case slotModality:
		s.part.kind = modalityOf(text)
	case slotFinish:
		s.finished = s.finished || len(text) > 0
	case slotQuery:
		s.queries.add(text)
		s.state = scanNext
	case slotItemType, slotActionType, slotContainer:
		s.item.set(s.slot, text)
	case slotCustomID:
		s.isResult = true
	case slotSize, slotQuality:
		s.pictures.set(s.slot, text)
	default:
		s.setNumber(text[:min(len(text), maxCountLen+1)])
	}
}

// bufferText keeps a part of a string that comes in pieces.
func (s *usageScanner) bufferText(b []byte) {
	if space := maxReportedModelLen - s.length; space > 0 {
		s.text = append(s.text[:s.length], b[:min(len(b), space)]...)
	}
	s.length = min(s.length+len(b), maxReportedModelLen+1)
}

// discardEarlier drops the value of an earlier member of the same name: the last one counts, as in encoding/json.
func (s *usageScanner) discardEarlier() {
	switch s.slot {
	case slotUsage:
		s.usageSeen = s.usageSeen && (s.usageInner || s.isInner())
	case slotChoices:
		s.choicesEmpty = false
	case slotError:
		s.hasError = false
	}
}
