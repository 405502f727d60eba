// This room makes the ids of calls: numbers that grow with time, so that the
// ledger is in order of time, and the text that clients see of them. Plain code.
package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// formatDollars is the inverse of parseDollars; noPrice gives "".
func formatDollars(pico int64) string {
	if pico < 0 {
		return ""
	}
	return formatDecimal(pico, 6)
}

// formatNanos writes nano-dollars as dollars with as many of nine decimals as it takes.
func formatNanos(nanos int64) string { return formatDecimal(nanos, 9) }

// formatDecimal writes n/10^places without needless zeros.
func formatDecimal(n int64, places int) string {
	sign, magnitude := "", uint64(n)
	if n < 0 {
		sign, magnitude = "-", -magnitude
	}
	all := fmt.Sprintf("%0*d", places+1, magnitude)
	whole, decimals := all[:len(all)-places], strings.TrimRight(all[len(all)-places:], "0")
	if decimals == "" {
		return sign + whole
	}
	return sign + whole + "." + decimals
}

// parseSize reads a size in bytes with one of the units B, KiB, MiB and GiB.
func parseSize(s string, least, most int64) (int64, error) {
	units := []struct {
		name string
		size int64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"B", 1}, {"", 1}}
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil {
			break
		}
		if n < (least+u.size-1)/u.size || n > most/u.size {
			return 0, fmt.Errorf("must be from %s to %s", formatSize(least), formatSize(most))
		}
		return n * u.size, nil
	}
	return 0, errors.New("must be a whole number of bytes, KiB, MiB or GiB, as in 32MiB")
}

func formatSize(n int64) string {
	for _, u := range []struct {
		name string
		size int64
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size && n%u.size == 0 {
			return strconv.FormatInt(n/u.size, 10) + u.name
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

// An idSource makes the ids of calls: 42 bits of unix milliseconds, 9 of a
// number that tells replicas apart, 12 that count. They grow all the time, even
// when the clock goes back.
type idSource struct {
	node int64
	last atomic.Int64
}

const idTimeShift = 21

// newIDSource makes ids above last, the highest there is.
func newIDSource(last int64) *idSource {
	s := &idSource{node: rand.Int64N(512) << 12}
	s.last.Store(last)
	return s
}

func (s *idSource) next(now time.Time) int64 {
	for {
		last, id := s.last.Load(), now.UnixMilli()<<idTimeShift|s.node
		if id <= last {
			id = last + 1
			if id&0xfff == 0 { // 4096 in a millisecond: borrow from the next
				id = (last>>idTimeShift+1)<<idTimeShift | s.node
			}
		}
		if s.last.CompareAndSwap(last, id) {
			return id
		}
	}
}

// minIDAt returns the least id that a call begun at t can have.
func minIDAt(t time.Time) int64 { return t.UnixMilli() << idTimeShift }

const crockford = "0123456789abcdefghjkmnpqrstvwxyz"

// formatRequestID writes a call's id as clients see it; parseRequestID reads it back,
// 0 if it is none.
func formatRequestID(id int64) string {
	out := []byte("req_0000000000000")
	for i := len(out) - 1; i >= 4; i-- {
		out[i] = crockford[id&31]
		id >>= 5
	}
	return string(out)
}

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

// clip shortens text from outside before it is shown.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most] + "…"
}

// appendJSONString appends s as a string of JSON.
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

// maxTokenCount bounds every token count: no answer has more, and sums of it cannot overflow.
const maxTokenCount = 1_000_000_000_000

// tokenCounts is normalised: input includes cached, cacheWrite and audioInput; output includes reasoning
// and audioOutput. No part is larger than its whole, and all are between 0 and maxTokenCount.
type tokenCounts struct {
	input, cached, cacheWrite, output, reasoning, audioInput, audioOutput int64
}

// usageSource says how far a count can be trusted; its text is what the ledger stores.
type usageSource string

const (
	usageExact     usageSource = "exact"     // the provider's own count
	usageEstimated usageSource = "estimated" // the answer has none, or only half of one
	usageNone      usageSource = "none"      // the answer is not counted in tokens
)

// A limitMetric is what a limit counts.
type limitMetric uint8

const (
	metricRequests   limitMetric = iota + 1 // calls that were forwarded, whatever came of them
	metricTokens                            // input and output together
	metricDollars                           // by the prices of the program and of its operator
	metricConcurrent                        // calls that run at one time
)

func (m limitMetric) String() string {
	return [...]string{"", "requests", "tokens", "dollars", "concurrent"}[m]
}

// A limitPeriod is the time over which a limit counts.
//
// A second and a minute are buckets: they hold max, and what was taken flows
// back evenly. All longer ones are windows of the calendar in UTC, which begin
// at the full hour, at midnight, on Monday, on the first of the month.
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

func (p limitPeriod) String() string {
	return [...]string{"", "second", "minute", "hour", "day", "week", "month", "lifetime"}[p]
}

// bucketMS returns the milliseconds in which a bucket refills, 0 for a window.
func (p limitPeriod) bucketMS() int64 {
	switch p {
	case perSecond:
		return 1000
	case perMinute:
		return 60_000
	}
	return 0
}

// window returns the bounds of the calendar window that holds now, all in unix
// milliseconds. A lifetime has none.
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

// A requestRow is one call in the ledger. Its first part is known when it begins.
type requestRow struct {
	id       int64
	started  int64 // unix milliseconds
	project  int64
	token    int64
	endpoint string
	stream   bool
	address  string

	upstream              int64
	model                 string
	status                int
	outcome               callOutcome
	errorCode             string
	source                usageSource
	counts                tokenCounts
	cost                  int64 // nano-dollars; meaningful only if priced
	priced                bool
	firstByteUS           int64 // -1: none left
	totalUS               int64
	attempts              int
	cache                 string
	attemptLog            string      // JSON, "" of a call that needed one attempt
	limitHit              string      // the limit that refused the call, or a shadow limit that would have
	wouldRefuse           bool        // it is a shadow limit
	requestedModel        string      // the model asked for
	content               *contentRow // nil: not kept
	modelTracked          bool        // the model may name a sum of its own (see sumModel)
	requestedModelTracked bool        // so may the model asked for
}

// A callOutcome says how a call ended, as the ledger writes it.
type callOutcome string

const (
	outcomeOpen          callOutcome = "open" // it runs
	outcomeOK            callOutcome = "ok"
	outcomeRefused       callOutcome = "refused"        // by us: no right, no room, not allowed
	outcomeClientGone    callOutcome = "client_gone"    // the client left before the end
	outcomeTruncated     callOutcome = "truncated"      // we or the provider cut an answer that had begun
	outcomeUpstreamError callOutcome = "upstream_error" // the provider failed or answered 4xx/5xx
	outcomeLost          callOutcome = "lost"           // the program died during the call
)

const (
	hourMS = 3_600_000
	dayMS  = 24 * hourMS
)

// A role is what a management key may do. Each includes the ones before.
type role string

const (
	roleViewer   role = "viewer"   // sees everything but keys
	roleOperator role = "operator" // makes, changes and revokes tokens
	roleAdmin    role = "admin"    // projects, provider keys, prices, management keys
)

func (r role) rank() int {
	switch r {
	case roleViewer:
		return 1
	case roleOperator:
		return 2
	case roleAdmin:
		return 3
	}
	return 0
}

// An actor is who acts: a stored management key, or the one in the environment.
type actor struct {
	id, name string
	role     role
}

// A contentRow is what the store has of a call's content, sealed.
type contentRow struct {
	id, project, expiresAt      int64
	request, response           []byte
	requestBytes, responseBytes int64
}

// buckets are steps of about 1.6, five in each power of ten: fine enough for a
// quantile to be off by less than a tenth, few enough to stand in one row.
const latencyBuckets = 22

// latencyBounds are the highest milliseconds of the buckets but the last, which
// has no end.
func latencyBounds() [latencyBuckets - 1]int64 {
	return [...]int64{10, 16, 25, 40, 63, 100, 160, 250, 400, 630, 1000, 1600, 2500, 4000, 6300, 10000, 16000, 25000, 40000, 63000, 100000}
}

// latencyHistogram counts times by bucket.
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
		n += v
	}
	return n
}

// quantile returns the time in milliseconds that part q of the counted times do
// not exceed, as if times lay evenly, in their logarithm, within a bucket; +Inf if
// that is in the last bucket, and -1 if nothing was counted.
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

// A keyState is what is known of a key. The later ones are worse.
type keyState uint8

const (
	keyReady       keyState = iota
	keyCooling              // the provider said that it gets too many calls
	keyBreakerOpen          // it fails, and the breaker is open
	keyExhausted            // its account has no money or quota left
	keyQuarantined          // the provider refuses the key, or it cannot be read
)

func keyStateNames() []string {
	return []string{"ready", "cooling", "open", "exhausted", "quarantined"}
}

func (s keyState) String() string { return keyStateNames()[s] }

// needsAttention reports whether somebody must do something about it.
func (s keyState) needsAttention() bool { return s >= keyExhausted }

// A healthRow is a key's health as stored and shown.
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

// A timestamp is a time in answers: unix milliseconds inside, RFC 3339 outside.
type timestamp int64

func (t timestamp) MarshalJSON() ([]byte, error) {
	return []byte(time.UnixMilli(int64(t)).UTC().Format(`"2006-01-02T15:04:05.000Z07:00"`)), nil
}

// datetimeLocal writes a time as an input for times has it.
func (t timestamp) datetimeLocal() string {
	return time.UnixMilli(int64(t)).UTC().Format("2006-01-02T15:04")
}

func newTimestamp(p *int64) *timestamp {
	if p == nil {
		return nil
	}
	return new(timestamp(*p))
}
