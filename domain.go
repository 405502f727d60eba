// This file holds the domain types and the formatting that every layer shares, by subject:
//
//	money, sizes, durations and text      how values are written, and some read back
//	tokens                                what an answer used, and where the counts come from
//	limits                                what a limit counts, and over which period
//	calls                                 a row of the ledger and how a call ended
//	actors                                management keys and their roles
//	latency                               a histogram with quantiles
//	key health                            the state of a provider key
//	times                                 unix milliseconds inside, RFC 3339 outside
//	JSON objects of administrators        read strictly, with errors that name the field
//
// Plain code: it does no I/O and uses no other file of the program.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Money, sizes, durations and text.

// addSat adds, and returns the nearest int64 where the sum has none. All sums of tokens, money and time use it:
// a sum that wrapped around would open every limit, and SQLite refuses or falsifies what overflows.
func addSat(a, b int64) int64 {
	switch sum := a + b; {
	case a > 0 && b > 0 && sum < 0:
		return math.MaxInt64
	case a < 0 && b < 0 && sum >= 0:
		return math.MinInt64
	default:
		return sum
	}
}

// mulSat multiplies numbers of 0 or more, and returns the largest int64 if the product is larger.
func mulSat(a, b int64) int64 {
	if a > 0 && b > math.MaxInt64/a {
		return math.MaxInt64
	}
	return a * b
}

// formatNanos writes nano-dollars as dollars, with at most nine decimals.
func formatNanos(nanos int64) string { return formatDecimal(nanos, 9) }

// formatDecimal writes n/10^places without trailing zeros.
func formatDecimal(n int64, places int) string {
	sign, magnitude := "", uint64(n)
	if n < 0 {
		sign, magnitude = "-", -magnitude
	}
	digits := fmt.Sprintf("%0*d", places+1, magnitude)
	whole, decimals := digits[:len(digits)-places], strings.TrimRight(digits[len(digits)-places:], "0")
	if decimals == "" {
		return sign + whole
	}
	return sign + whole + "." + decimals
}

// formatMoney writes nano-dollars for people: "$1,234.50", and below a dollar with two significant digits, but at
// least two decimals: "$0.42", "$0.0042". With groupDigits and describeDuration it writes the amounts of limits,
// the same in errors, pages, logs and records.
func formatMoney(nanos int64) string {
	sign, n := "", uint64(nanos)
	if nanos < 0 {
		sign, n = "-", -n
	}
	places, unit := 2, uint64(10_000_000) // nano-dollars of the last place
	for small := uint64(100_000_000); n > 0 && n < small && places < 9; small /= 10 {
		places, unit = places+1, unit/10
	}
	digits := fmt.Sprintf("%0*d", places+1, (n+unit/2)/unit)
	point := len(digits) - places
	decimals := digits[point:point+2] + strings.TrimRight(digits[point+2:], "0")
	return sign + "$" + groupText(digits[:point]) + "." + decimals
}

// groupDigits returns a number with a comma between groups of three digits.
func groupDigits(n int64) string {
	digits := strconv.FormatInt(n, 10)
	if digits[0] == '-' {
		return "-" + groupText(digits[1:])
	}
	return groupText(digits)
}

func groupText(digits string) string {
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

func pluralize(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return groupDigits(n) + " " + many
}

// describeDuration writes how long to wait, in one or two units and never too short: "2 minutes", "1 hour 5 minutes".
func describeDuration(d time.Duration) string {
	units := [...]struct {
		length time.Duration
		name   string
	}{{24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}, {time.Second, "second"}}
	if d <= 0 {
		return "0 seconds"
	}
	roundUp := func(to time.Duration) { d = max(d, (d-1)/to*to+to) }
	roundUp(time.Second)
	if d >= time.Hour {
		roundUp(time.Minute)
	}
	if d >= 24*time.Hour {
		roundUp(time.Hour)
	}
	var text strings.Builder
	for _, u := range units {
		if n := int64(d / u.length); n > 0 {
			text.WriteString(" " + pluralize(n, u.name, u.name+"s"))
			d %= u.length
		}
	}
	return strings.TrimPrefix(text.String(), " ")
}

type sizeUnit struct {
	name  string
	bytes int64
}

func sizeUnits() []sizeUnit {
	return []sizeUnit{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}, {"", 1}}
}

// parseSize reads a size in bytes, with a unit or without.
func parseSize(s string, lowest, highest int64) (int64, error) {
	for _, u := range sizeUnits() {
		digits, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil {
			break
		}
		if n < (lowest+u.bytes-1)/u.bytes || n > highest/u.bytes {
			return 0, fmt.Errorf("must be from %s to %s", formatSize(lowest), formatSize(highest))
		}
		return n * u.bytes, nil
	}
	return 0, errors.New("must be a whole number of bytes, KiB, MiB or GiB, such as 32MiB")
}

// formatSize writes a size in the largest unit that divides it.
func formatSize(n int64) string {
	for _, u := range sizeUnits() {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// formatDuration writes a duration as parseDuration reads it.
func formatDuration(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= 2*day && d%day == 0:
		return strconv.FormatInt(int64(d/day), 10) + "d"
	case d >= time.Hour && d%time.Hour == 0:
		return strconv.FormatInt(int64(d/time.Hour), 10) + "h"
	}
	return d.String()
}

// clip shortens text from outside to at most maxLen bytes and an ellipsis, without cutting a character.
func clip(s string, maxLen int) string {
	if len(s) <= maxLen {
		return s
	}
	for maxLen > 0 && !utf8.RuneStart(s[maxLen]) {
		maxLen--
	}
	return s[:maxLen] + "…"
}

// appendJSONString appends s to b as a JSON string.
func appendJSONString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			var text bytes.Buffer
			e := json.NewEncoder(&text)
			e.SetEscapeHTML(false)
			_ = e.Encode(s) // a string: it cannot fail
			return append(b, bytes.TrimSuffix(text.Bytes(), []byte{'\n'})...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// mustMarshal returns the JSON of a value that always has some; null after a bug, which must not stop a revocation.
func mustMarshal(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		return json.RawMessage("null")
	}
	return b
}

// Tokens.

// maxTokenCount bounds every token count. No answer has more, and sums of millions of calls do not overflow.
const maxTokenCount = 1_000_000_000_000

// A usageSource is where counts come from. The ledger stores its text.
type usageSource string

const (
	usageExact     usageSource = "exact"     // the provider's own counts
	usageEstimated usageSource = "estimated" // the answer has no counts, or only some
	usageNone      usageSource = "none"      // the answer is not billed in tokens
)

// Limits.

// A limitMetric is what a limit counts.
type limitMetric uint8

const (
	metricRequests   limitMetric = iota + 1 // forwarded calls, whatever came of them
	metricTokens                            // input and output together
	metricDollars                           // at list prices or the prices that an administrator set
	metricConcurrent                        // calls running at one time
)

func (m limitMetric) String() string {
	return [...]string{"", "requests", "tokens", "dollars", "concurrent"}[m]
}

// A limitPeriod is the time over which a limit counts.
//
// Second and minute are token buckets: a bucket holds the limit's max, and what was used refills
// evenly. Longer periods are calendar windows in UTC: they start at the full hour, at midnight, on
// Monday or on the first of the month. A lifetime never ends.
type limitPeriod uint8

const (
	perSecond limitPeriod = iota + 1
	perMinute
	perHour
	perDay
	perWeek
	perMonth
	perLifetime
)

const (
	hourMS = 3_600_000
	dayMS  = 24 * hourMS
)

func (p limitPeriod) String() string {
	return [...]string{"", "second", "minute", "hour", "day", "week", "month", "lifetime"}[p]
}

// bucketMS returns the milliseconds in which a bucket refills, and 0 for a window.
func (p limitPeriod) bucketMS() int64 {
	switch p {
	case perSecond:
		return 1000
	case perMinute:
		return 60_000
	}
	return 0
}

// window returns the bounds of the calendar window around now, in unix milliseconds, and 0, 0 for a
// lifetime.
func (p limitPeriod) window(now int64) (from, to int64) {
	switch p {
	case perHour:
		return now - now%hourMS, now - now%hourMS + hourMS
	case perDay:
		return now - now%dayMS, now - now%dayMS + dayMS
	case perWeek:
		const monday = 4 * dayMS // 1970-01-05
		from = now - (now-monday)%(7*dayMS)
		return from, from + 7*dayMS
	case perMonth:
		t := time.UnixMilli(now).UTC()
		month := time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
		return month.UnixMilli(), month.AddDate(0, 1, 0).UnixMilli()
	}
	return 0, 0
}

// Calls.

// A requestRow is one call in the ledger. The first group of fields is set when the call starts, the second
// when it is settled.
type requestRow struct {
	id, started       int64 // started in unix milliseconds
	project, token    int64
	endpoint, address string
	stream            bool
	attribution       *attribution
	limitUses         []limitUse // what the call counts in limits with for_each, once it has ended

	upstream              int64
	model                 string
	status                int
	outcome               callOutcome
	errorCode             string
	source                usageSource
	counts                tokenCounts
	details               usageDetails
	price                 *price // that the cost is made of; nil: none
	promptSaved           int64  // nano-dollars that cached input would have cost more
	pictureSize           string // for the price, like the next; "": not known
	pictureQuality        string
	cost                  int64 // nano-dollars; only valid if priced
	priced                bool
	firstByteUS           int64 // -1: no byte was sent
	totalUS               int64
	attempts              int
	cache                 string      // "hit": the answer came from the cache
	saved                 int64       // nano-dollars that a hit would have cost
	savedUS               int64       // how much longer a hit would have taken
	attemptLog            string      // JSON; "" if one attempt was enough
	routedBy              string      // affinitySession or affinityPrompt; "": by priority and weight
	clientRetry           int64       // how often the client has sent the call before, as it says; 0: never, or unsaid
	idempotencyHash       int64       // keyed, of the token and the Idempotency-Key; 0: there is none
	isClientRetry         bool        // clientRetry is not 0, or the token has sent the Idempotency-Key before
	limitHit              string      // the limit that refused the call, or the shadow limit that would have
	wouldRefuse           bool        // limitHit is a shadow limit
	refusal               string      // what the client of a refused call was told
	requestedModel        string      // the model that the client asked for
	content               *contentRow // nil: not kept
	modelTracked          bool        // model may have its own sums (see sumModel)
	requestedModelTracked bool        // requestedModel may have its own sums

	// Until the usage of the background response with this id at the provider is known, limits count what was reserved.
	backgroundID                                string
	reservedInput, reservedOutput, reservedCost int64
	usageOf                                     int64  // not 0: no call, but the usage of this one, now known
	counted                                     bool   // the ledger has added usageOf's usage to the sums
	batch                                       string // the object with the results that usageOf's usage is of
	batchLines, linesCounted                    int64  // of them: in this usage, and counted before
}

// durableFields returns pointers to the fields that describe the call, in a fixed order. Stored content is not
// among them, nor is the price, of which the cost was made.
func (r *requestRow) durableFields() []any {
	fields := []any{&r.id, &r.started, &r.project, &r.token, &r.endpoint, &r.stream, &r.address, &r.upstream, &r.model,
		&r.status, &r.outcome, &r.errorCode, &r.source, &r.counts.input, &r.counts.cached, &r.counts.cacheWrite,
		&r.counts.output, &r.counts.reasoning, &r.counts.audioInput, &r.counts.audioOutput, &r.cost, &r.priced,
		&r.firstByteUS, &r.totalUS, &r.attempts, &r.cache, &r.attemptLog, &r.limitHit, &r.wouldRefuse, &r.promptSaved,
		&r.requestedModel, &r.modelTracked, &r.requestedModelTracked, &r.saved, &r.savedUS,
		&r.backgroundID, &r.reservedInput, &r.reservedOutput, &r.reservedCost, &r.usageOf, &r.counted, &r.attribution,
		&r.batch, &r.batchLines, &r.linesCounted, &r.limitUses,
		&r.routedBy, &r.clientRetry, &r.idempotencyHash, &r.isClientRetry,
		&r.pictureSize, &r.pictureQuality, &r.refusal}
	for _, c := range r.details.counts() {
		fields = append(fields, c.count)
	}
	d := &r.details
	return append(fields, &d.searchContext, &d.tier, &d.speed, &d.region)
}

// A callOutcome says how a call ended. The ledger stores its text.
type callOutcome string

const (
	outcomeOpen          callOutcome = "open" // still running
	outcomeOK            callOutcome = "ok"
	outcomeRefused       callOutcome = "refused"        // by the proxy: not authorized, not allowed, over a limit
	outcomeClientGone    callOutcome = "client_gone"    // the client left before the end
	outcomeTruncated     callOutcome = "truncated"      // the provider or the proxy cut off an answer
	outcomeUpstreamError callOutcome = "upstream_error" // the provider failed or answered 4xx or 5xx
	outcomeLost          callOutcome = "lost"           // the program ended during the call
)

// A contentRow is the stored content of a call, sealed.
type contentRow struct {
	id, project, expiresAt      int64
	request, response           []byte
	requestBytes, responseBytes int64
}

// Actors.

// A role is what a management key may do. Each role includes those before it.
type role string

const (
	roleViewer   role = "viewer"   // sees everything but keys
	roleOperator role = "operator" // creates, changes and revokes tokens
	roleAdmin    role = "admin"    // manages projects, provider keys, prices and management keys
)

// rank orders the roles; 0 is no role.
func (r role) rank() int { return slices.Index([]role{roleViewer, roleOperator, roleAdmin}, r) + 1 }

// An actor is the holder of a management key: a stored one, or the one in the environment.
type actor struct {
	id, name string
	role     role
}

// Latency.

// latencyBuckets grow by a factor of about 1.6, five to a power of ten: fine enough for a quantile to be
// off by less than a tenth, and few enough for one row.
const latencyBuckets = 22

// latencyBounds returns the upper bounds in milliseconds of all buckets but the last, which has none.
func latencyBounds() [latencyBuckets - 1]int64 {
	return [...]int64{10, 16, 25, 40, 63, 100, 160, 250, 400, 630, 1000, 1600, 2500, 4000, 6300,
		10000, 16000, 25000, 40000, 63000, 100000}
}

// A latencyHistogram counts times by bucket.
type latencyHistogram [latencyBuckets]int64

func (h *latencyHistogram) observe(us int64) {
	for i, bound := range latencyBounds() {
		if us <= bound*1000 {
			h[i]++
			return
		}
	}
	h[latencyBuckets-1]++
}

func (h *latencyHistogram) total() (n int64) {
	for _, v := range h {
		n = addSat(n, v)
	}
	return n
}

// quantile returns the milliseconds that a share q of the times does not exceed. It assumes that the times
// of a bucket are spread evenly on a logarithmic scale. It returns +Inf if the quantile is in the last bucket,
// and -1 if there are no times.
func (h *latencyHistogram) quantile(q float64) float64 {
	total := h.total()
	if total == 0 {
		return -1
	}
	rank, below := q*float64(total), 0.0
	bounds := latencyBounds()
	for i, bound := range bounds {
		n := float64(h[i])
		if n > 0 && below+n >= rank {
			low := float64(bound) / 1.6
			if i > 0 {
				low = float64(bounds[i-1])
			}
			return low * math.Pow(float64(bound)/low, (rank-below)/n)
		}
		below += n
	}
	return math.Inf(1)
}

// Key health.

// A keyState is the state of a provider key, in order of severity.
type keyState uint8

const (
	keyReady       keyState = iota
	keyCooling              // the provider answered that there are too many calls
	keyBreakerOpen          // calls fail, and the circuit breaker is open
	keyExhausted            // the provider account has no money or quota left
	keyQuarantined          // the provider refuses the key, or the key cannot be read
)

func keyStateNames() []string {
	return []string{"ready", "cooling", "open", "exhausted", "quarantined"}
}

func (s keyState) String() string { return keyStateNames()[s] }

// needsAttention reports whether only an administrator can resolve the state.
func (s keyState) needsAttention() bool { return s >= keyExhausted }

// A healthRow is a key's health as it is stored and shown.
type healthRow struct {
	upstream  int64
	id        string
	state     keyState
	until     int64
	strikes   int
	reason    string
	changedAt int64
	running   int64
}

// Times.

// A timestamp is a time in JSON answers: unix milliseconds inside, RFC 3339 outside.
type timestamp int64

func (t timestamp) MarshalJSON() ([]byte, error) {
	return []byte(time.UnixMilli(int64(t)).UTC().Format(`"2006-01-02T15:04:05.000Z07:00"`)), nil
}

// UnmarshalJSON reads what MarshalJSON has written.
func (t *timestamp) UnmarshalJSON(b []byte) error {
	at, err := time.Parse(`"`+time.RFC3339+`"`, string(b))
	*t = timestamp(at.UnixMilli())
	return err
}

// datetimeLocal writes a time as an HTML input of type datetime-local takes it.
func (t timestamp) datetimeLocal() string {
	return time.UnixMilli(int64(t)).UTC().Format("2006-01-02T15:04")
}

// newTimestamp returns nil for nil.
func newTimestamp(p *int64) *timestamp {
	if p == nil {
		return nil
	}
	return new(timestamp(*p))
}

// JSON objects that administrators send. They are read strictly: an unknown, repeated or wrongly capitalized name is an
// error that names the field. If it were ignored, a misspelled limit would limit nothing.

// A fieldError is a mistake in a request, reported to its sender. param is the field's name, and msg continues
// the sentence; if param is "", the mistake is in the body as a whole, and msg is a sentence.
type fieldError struct{ param, msg string }

func (e *fieldError) Error() string {
	if e.param == "" {
		return e.msg
	}
	return e.param + ": " + e.msg
}

// An optional is a field that may be absent, null or a value. A PATCH must tell the three apart.
type optional[T any] struct {
	set, null bool
	value     T
	mistake   error // the text in the input of a form is no value
}

func (o *optional[T]) UnmarshalJSON(b []byte) error {
	if o.set, o.null = true, string(b) == "null"; o.null {
		return nil
	}
	return json.Unmarshal(b, &o.value)
}

// hasValue reports whether the field holds a value.
func (o optional[T]) hasValue() bool { return o.set && !o.null }

func (o *optional[T]) unreadable() error { return o.mistake }

// decodeObject reads one JSON object into the pointers of fields, by exact name. Only the fields in
// nullable may be null. Every error is a *fieldError.
func decodeObject(body []byte, fields map[string]any, nullable ...string) error {
	if !utf8.Valid(body) {
		return &fieldError{"", "The body is not valid UTF-8."}
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return &fieldError{"", "The body must be one JSON object."}
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return syntaxError(dec)
		}
		target, ok := fields[name]
		switch {
		case !ok:
			all := strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
			return &fieldError{clip(name, 64), "is not a known field; known are: " + cmp.Or(all, "none")}
		case seen[name]:
			return &fieldError{name, "is given twice"}
		}
		seen[name] = true
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return syntaxError(dec)
		}
		if string(raw) == "null" && !slices.Contains(nullable, name) {
			return &fieldError{name, "must be " + expectedType(target) + ", not null"}
		}
		if err := json.Unmarshal(raw, target); err != nil {
			if _, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
				return &fieldError{name, "must be " + expectedType(target)}
			}
			if fe, ok := errors.AsType[*fieldError](err); ok {
				return fe
			}
			return syntaxError(dec)
		}
	}
	if _, err := dec.Token(); err != nil {
		return syntaxError(dec)
	}
	if _, err := dec.Token(); err != io.EOF {
		return &fieldError{"", "The body has data after its JSON object."}
	}
	return nil
}

func syntaxError(dec *json.Decoder) error {
	return &fieldError{"", fmt.Sprintf("The body is not valid JSON at byte %d.", dec.InputOffset())}
}

// expectedType describes the values that a field's pointer accepts.
func expectedType(target any) string {
	switch target.(type) {
	case *optional[string], *optional[secret], *string:
		return "a string"
	case *optional[int64], *int64:
		return "a whole number"
	case *optional[bool], *bool:
		return "true or false"
	case *optional[[]string], *[]string:
		return "a list of strings"
	case *optional[map[string]string]:
		return "an object of strings"
	case *optional[json.RawMessage]:
		return "a value"
	case *optional[[]json.RawMessage]:
		return "a list of objects"
	}
	return "of another type"
}

// durationMS reads a duration from the beginning of v, such as 1m30.5s, 20 seconds or PT30S. It returns
// milliseconds, and the rest of v, which is v if it does not begin with a duration.
func durationMS(v string) (ms float64, rest string) {
	rest = strings.ToLower(v)
	rest = strings.TrimPrefix(strings.TrimPrefix(rest, "p"), "t")
	sum, found := 0.0, false
	for {
		next := strings.TrimLeft(rest, " t")
		digits := len(next) - len(strings.TrimLeft(next, "0123456789."))
		n, err := strconv.ParseFloat(strings.TrimRight(next[:digits], "."), 64)
		if err != nil {
			break
		}
		word := strings.TrimLeft(next[digits:], " ")
		letters := len(word) - len(strings.TrimLeft(word, "abcdefghijklmnopqrstuvwxyz\u00b5\u03bc"))
		if strings.HasPrefix(word, "dt") { // P1DT2H
			letters = 1
		}
		unit := unitMS(word[:letters])
		if unit == 0 {
			break
		}
		sum, found, rest = sum+n*unit, true, word[letters:]
	}
	if !found {
		return 0, v
	}
	return sum, rest
}

// unitMS returns how many milliseconds a unit of time has, 0 if the word is none.
func unitMS(word string) float64 {
	switch word {
	case "ns", "us", "\u00b5s", "\u03bcs":
		return 0.001
	case "ms", "msec", "millisecond", "milliseconds":
		return 1
	case "s", "sec", "secs", "second", "seconds":
		return 1000
	case "m", "min", "mins", "minute", "minutes":
		return 60_000
	case "h", "hr", "hrs", "hour", "hours":
		return 3_600_000
	case "d", "day", "days":
		return 86_400_000
	}
	return 0
}
