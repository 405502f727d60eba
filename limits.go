// This room says what a limit is: it reads limits from a policy, holds them to
// their rules and puts them into words. Plain code; counting is ratelimit.go's.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A measure is what a limit counts.
type measure uint8

const (
	countRequests   measure = iota + 1 // calls that were forwarded, whatever came of them
	countTokens                        // input and output together
	countDollars                       // by the prices of the program and of its operator
	countConcurrent                    // calls that run at one time
)

func (m measure) String() string {
	return [...]string{"", "requests", "tokens", "dollars", "concurrent"}[m]
}

// A span is the time over which a limit counts.
//
// A second and a minute are buckets: they hold max, and what was taken flows
// back evenly. All longer ones are windows of the calendar in UTC, which begin
// at the full hour, at midnight, on Monday, on the first of the month.
type span uint8

const (
	perSecond span = iota + 1
	perMinute
	perHour
	perDay
	perWeek
	perMonth
	perLifetime
)

func (p span) String() string {
	return [...]string{"", "second", "minute", "hour", "day", "week", "month", "lifetime"}[p]
}

// bucket returns the milliseconds in which a bucket refills, 0 for a window.
func (p span) bucket() int64 {
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
func (p span) window(now int64) (from, to int64) {
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

// A limit is one rule of a policy. A call counts in it if both patterns match.
// It is immutable.
type limit struct {
	count    measure
	per      span   // 0 for countConcurrent
	shadow   bool   // refuses nothing, and counts what it would have refused
	max      int64  // requests, tokens, calls; for dollars nano-dollars
	endpoint string // "" for every endpoint
	model    string // a pattern for the model asked for, "" for every model
}

// A limitKey says which limits count the same: a change of max alone keeps the
// count.
type limitKey struct {
	count           measure
	per             span
	shadow          bool
	endpoint, model string
}

func (l *limit) key() limitKey { return limitKey{l.count, l.per, l.shadow, l.endpoint, l.model} }

// applies reports whether a call of an endpoint (its name, METHOD and pattern,
// and its pattern) and a model counts in l.
func (l *limit) applies(name, pattern, model string) bool {
	return (l.endpoint == "" || matches(l.endpoint, name) || matches(l.endpoint, pattern)) &&
		(l.model == "" || matches(l.model, model))
}

// quota reports whether l, once spent, is spent for so long that a client
// should not try again by itself.
func (l *limit) quota() bool { return l.per >= perDay }

// String is the limit in words: "60 requests per minute for models gpt-4o*".
func (l *limit) String() string {
	var b strings.Builder
	switch l.count {
	case countConcurrent:
		b.WriteString(strconv.FormatInt(l.max, 10) + " calls at one time")
	case countDollars:
		b.WriteString("$" + formatNanos(l.max))
	default:
		b.WriteString(strconv.FormatInt(l.max, 10) + " " + l.count.String())
	}
	switch l.per {
	case 0:
	case perLifetime:
		b.WriteString(" in all")
	default:
		b.WriteString(" per " + l.per.String())
	}
	if l.endpoint != "" {
		b.WriteString(" on " + l.endpoint)
	}
	if l.model != "" {
		b.WriteString(" for models " + l.model)
	}
	return b.String()
}

// amount writes a count of l's kind as JSON has it.
func (l *limit) amount(n int64) json.RawMessage {
	if l.count == countDollars {
		return json.RawMessage(formatNanos(n))
	}
	return json.RawMessage(strconv.FormatInt(n, 10))
}

type limitJSON struct {
	Count    string          `json:"count"`
	Max      json.RawMessage `json:"max"`
	Per      string          `json:"per,omitzero"`
	Endpoint string          `json:"endpoint,omitzero"`
	Model    string          `json:"model,omitzero"`
	Shadow   bool            `json:"shadow,omitzero"`
}

func (l limit) MarshalJSON() ([]byte, error) {
	return json.Marshal(limitJSON{l.count.String(), l.amount(l.max), l.per.String(), l.endpoint, l.model, l.shadow})
}

const (
	maxLimits        = 20 // of one policy: each call looks at all of them
	maxLimitCount    = 1_000_000_000_000
	maxLimitDollars  = 100_000_000
	maxLimitParallel = 1_000_000
)

// parseLimits reads a policy's list of limits. Errors name the entry and the
// field.
func parseLimits(raw []json.RawMessage) ([]limit, error) {
	if len(raw) > maxLimits {
		return nil, &fieldError{"policy.limits", fmt.Sprintf("must have %d entries or fewer", maxLimits)}
	}
	out := make([]limit, 0, len(raw))
	seen := map[limitKey]int{}
	for i, r := range raw {
		l, err := parseLimit(r)
		if err != nil {
			fe, ok := errors.AsType[*fieldError](err)
			if !ok {
				return nil, err
			}
			at := fmt.Sprintf("policy.limits[%d]", i)
			if fe.param == "" {
				return nil, &fieldError{at, "must be an object such as {\"count\":\"requests\",\"max\":60,\"per\":\"minute\"}"}
			}
			return nil, &fieldError{at + "." + fe.param, fe.msg}
		}
		if first, twice := seen[l.key()]; twice {
			return nil, &fieldError{fmt.Sprintf("policy.limits[%d]", i), fmt.Sprintf("counts the same as policy.limits[%d]; keep one of them", first)}
		}
		seen[l.key()] = i
		out = append(out, l)
	}
	return out, nil
}

func parseLimit(raw []byte) (limit, error) {
	var count, per, endpoint, model opt[string]
	var most opt[json.RawMessage]
	var shadow opt[bool]
	if err := decodeObject(raw, map[string]any{"count": &count, "max": &most, "per": &per,
		"endpoint": &endpoint, "model": &model, "shadow": &shadow}); err != nil {
		return limit{}, err
	}
	l := limit{shadow: shadow.v, endpoint: endpoint.v, model: model.v}
	for m := countRequests; m <= countConcurrent; m++ {
		if count.v == m.String() {
			l.count = m
		}
	}
	if l.count == 0 {
		return l, &fieldError{"count", "must be requests, tokens, dollars or concurrent"}
	}
	for p := perSecond; p <= perLifetime; p++ {
		if per.v == p.String() {
			l.per = p
		}
	}
	switch {
	case l.count == countConcurrent && per.set:
		return l, &fieldError{"per", "is not for concurrent, which counts calls that run at one time"}
	case l.count == countDollars && l.per < perHour:
		return l, &fieldError{"per", "must be hour, day, week, month or lifetime"}
	case l.count != countConcurrent && l.per == 0:
		return l, &fieldError{"per", "must be second, minute, hour, day, week, month or lifetime"}
	}
	for name, v := range map[string]opt[string]{"endpoint": endpoint, "model": model} {
		if v.set {
			if err := checkPatterns(name, []string{v.v}); err != nil {
				return l, err
			}
		}
	}
	var err error
	l.max, err = parseMax(l.count, string(most.v))
	return l, err
}

// parseMax reads max as JSON has it: a whole number, for dollars a decimal one.
func parseMax(m measure, text string) (int64, error) {
	most := int64(maxLimitCount)
	switch m {
	case countConcurrent:
		most = maxLimitParallel
	case countDollars:
		whole, decimals, point := strings.Cut(text, ".")
		if n, err := strconv.ParseInt(whole+(decimals + "000000000")[:9], 10, 64); err == nil && allDigits(whole) &&
			(!point || allDigits(decimals) && len(decimals) <= 9) && n <= maxLimitDollars*1_000_000_000 {
			return n, nil
		}
		return 0, &fieldError{"max", "must be dollars from 0 to 100000000, as in 12.50"}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > most {
		return 0, &fieldError{"max", fmt.Sprintf("must be a whole number from 0 (none) to %d; for no limit leave the entry out", most)}
	}
	return n, nil
}
