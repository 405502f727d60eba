// This room joins the limits of live projects and tokens to what the store knows
// of their past, and shows how they stand: to administrators, to the token's own
// holder, and in the headers of each answer.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// limitPatience is how long a call may wait, with the others of its project, for
// the past of a limit that is new to this process.
const limitPatience = 2 * time.Second

// A limitState joins live limits to what the store knows of their past.
type limitState struct {
	store    *store
	ledger   *ledger
	registry *registry
}

// adoptLimits puts the limits of t's policy and of its project's in force. The
// caller holds the limiter's mu, so that no call of the project comes or ends
// meanwhile.
func (ls *limitState) adoptLimits(t *liveToken, now int64) error {
	if err := ls.adoptProject(t.project, now); err != nil {
		return err
	}
	st := t.state.Load()
	return ls.adopt(&t.project.limiter, &t.limits, &st.policy, t.project.state.Load().seq, st.seq, now)
}

func (ls *limitState) adoptProject(p *liveProject, now int64) error {
	st := p.state.Load()
	return ls.adopt(&p.limiter, &p.limiter.project, &st.policy, st.seq, 0, now)
}

// adopt makes the counters of sub those of p, unless they are.
func (ls *limitState) adopt(l *limiter, sub *subject, p *policy, project, token, now int64) error {
	if sub.of == p {
		return nil
	}
	var past []pastUses
	if sub.lacking(p) {
		ctx, cancel := context.WithTimeout(context.Background(), limitPatience)
		defer cancel()
		if sub.admitted { // what it used may still be on its way into the sums
			if err := ls.ledger.flush(ctx); err != nil {
				return fmt.Errorf("waiting for the ledger: %w", err)
			}
		}
		var err error
		if past, err = ls.pastOf(ctx, p, project, token, now); err != nil {
			return err
		}
	}
	l.adopt(sub, p, now, func(l *limit) int64 { return usedOf(past, l) })
	return nil
}

// pastUses are what was used in one kind of window.
type pastUses struct {
	per  span
	uses []pastUse
}

// pastOf reads what was used in each window that a limit of p has.
func (ls *limitState) pastOf(ctx context.Context, p *policy, project, token, now int64) ([]pastUses, error) {
	var out []pastUses
next:
	for i := range p.Limits {
		per := p.Limits[i].per
		if per < perHour {
			continue
		}
		for _, o := range out {
			if o.per == per {
				continue next
			}
		}
		grain := "day"
		if per == perHour {
			grain = "hour"
		}
		from, _ := per.window(now)
		uses, err := ls.store.usedSince(ctx, grain, project, token, from)
		if err != nil {
			return nil, err
		}
		out = append(out, pastUses{per, uses})
	}
	return out, nil
}

// usedOf adds up what counts in l. A model that was not kept apart counts in
// every limit: a limit may refuse too early after a restart, never too late.
func usedOf(past []pastUses, l *limit) (n int64) {
	for _, p := range past {
		if p.per != l.per {
			continue
		}
		for _, u := range p.uses {
			_, pattern, _ := strings.Cut(u.endpoint, " ")
			asked := u.asked
			if asked == askedOther {
				asked = strings.TrimSuffix(l.model, "*")
			}
			if !l.applies(u.endpoint, pattern, asked) {
				continue
			}
			switch l.count {
			case countRequests:
				n += u.calls
			case countTokens:
				n += u.tokens
			case countDollars:
				n += u.nanosUSD
			}
		}
	}
	return n
}

// A limitView is how a limit stands.
type limitView struct {
	Count       string          `json:"count"`
	Max         json.RawMessage `json:"max"`
	Per         string          `json:"per,omitempty"`
	Endpoint    string          `json:"endpoint,omitempty"`
	Model       string          `json:"model,omitempty"`
	Shadow      bool            `json:"shadow"`
	Used        json.RawMessage `json:"used"`
	Reserved    json.RawMessage `json:"reserved"` // by running calls
	Left        json.RawMessage `json:"left"`
	ResetsAt    *stamp          `json:"resets_at"`    // null: never, or when calls end
	WouldRefuse int64           `json:"would_refuse"` // calls, since this process counts
}

func showLimits(counters []*counter, now int64) []limitView {
	out := make([]limitView, 0, len(counters))
	for _, c := range counters {
		c.advance(now)
		l := c.limit
		v := limitView{Count: l.count.String(), Max: l.amount(l.max), Per: l.per.String(), Endpoint: l.endpoint, Model: l.model, Shadow: l.shadow,
			Used: l.amount((c.used + c.unit() - 1) / c.unit()), Reserved: l.amount(c.held), Left: l.amount(c.left()), WouldRefuse: c.wouldRefuse}
		if l.count == countConcurrent { // what runs is in use, not set aside
			v.Used, v.Reserved = v.Reserved, v.Used
		}
		if at := c.resets(now); at > now {
			v.ResetsAt = new(stamp(at))
		}
		out = append(out, v)
	}
	return out
}

// resets is when all of the limit will be there again, now if it is, 0 if it
// never will be by itself.
func (c *counter) resets(now int64) int64 {
	switch {
	case c.limit.per.bucket() > 0 && c.limit.max > 0:
		return now + (c.used+c.limit.max-1)/c.limit.max
	case c.to > 0:
		return c.to
	}
	return 0
}

// upToDate returns a row with the calls that it does not know of yet: it learns of
// one when that has ended.
func (ls *limitState) upToDate(row *tokenRow, now int64) *tokenRow {
	t := ls.registry.liveToken(row.id)
	if t == nil {
		return row
	}
	up := *row
	if up.requestCount = t.used.Load(); t.running.Load() > 0 {
		up.lastUsedAt = &now
	} else if up.requestCount > row.requestCount {
		up.lastUsedAt = new(t.lastUsed.Load())
	}
	return &up
}

// tokenLimits shows how the limits of a token stand.
func (ls *limitState) tokenLimits(ctx context.Context, row *tokenRow, now int64) ([]limitView, error) {
	if t := ls.registry.liveToken(row.id); t != nil {
		t.project.limiter.mu.Lock()
		defer t.project.limiter.mu.Unlock()
		if err := ls.adoptLimits(t, now); err != nil {
			return nil, errUnavailable("limits_unavailable", err)
		}
		return showLimits(t.limits.counters, now), nil
	}
	return ls.storedLimits(ctx, row.policy, false, row.project, row.seq, now)
}

// projectLimits shows how the limits of a project stand.
func (ls *limitState) projectLimits(ctx context.Context, row *projectRow, now int64) ([]limitView, error) {
	if p := ls.registry.liveProject(row.seq); p != nil {
		p.limiter.mu.Lock()
		defer p.limiter.mu.Unlock()
		if err := ls.adoptProject(p, now); err != nil {
			return nil, errUnavailable("limits_unavailable", err)
		}
		return showLimits(p.limiter.project.counters, now), nil
	}
	return ls.storedLimits(ctx, row.policy, true, row.seq, 0, now)
}

// storedLimits is for what no call has used of late: all is in the store.
func (ls *limitState) storedLimits(ctx context.Context, text string, ofProject bool, project, token, now int64) ([]limitView, error) {
	counters, err := ls.storedCounters(ctx, text, ofProject, project, token, now)
	if err != nil {
		return nil, err
	}
	return showLimits(counters, now), nil
}

func (ls *limitState) storedCounters(ctx context.Context, text string, ofProject bool, project, token, now int64) ([]*counter, error) {
	p, err := parsePolicy([]byte(text), ofProject)
	if err != nil {
		return nil, err
	}
	past, err := ls.pastOf(ctx, &p, project, token, now)
	if err != nil {
		return nil, err
	}
	counters := make([]*counter, 0, len(p.Limits))
	for i := range p.Limits {
		counters = append(counters, newCounter(&p.Limits[i], now, usedOf(past, &p.Limits[i])))
	}
	return counters, nil
}

// A rateHeader is what is left of a limit, as the headers x-ratelimit-* say it.
type rateHeader struct {
	set         bool
	limit, left int64
	reset       time.Duration // until all of it is there again; 0: no such time is known
}

// rateHeaders are those of a token's tightest limits of requests and of tokens.
type rateHeaders struct{ requests, tokens rateHeader }

// rates finds the limits of t of which least is left. The caller holds the
// limiter's mu. The project's limits are not shown: they say what others use.
func (t *liveToken) rates(most, now int64) (r rateHeaders) {
	if most >= 0 {
		r.requests = rateHeader{set: true, limit: most, left: max(0, most-t.used.Load())}
	}
	for _, c := range t.limits.counters {
		to := &r.requests
		switch l := c.limit; {
		case l.count == countTokens:
			to = &r.tokens
		case l.count != countRequests:
			continue
		}
		if c.limit.shadow {
			continue
		}
		c.advance(now)
		if left := c.left(); !to.set || left < to.left {
			*to = rateHeader{true, c.limit.max, left, time.Duration(max(0, c.resets(now)-now)) * time.Millisecond}
		}
	}
	return r
}

// write sets the headers, in the form that OpenAI gives them.
func (r *rateHeaders) write(h http.Header) {
	for _, k := range [...]struct {
		of                      *rateHeader
		limit, remaining, reset string
	}{
		{&r.requests, "X-Ratelimit-Limit-Requests", "X-Ratelimit-Remaining-Requests", "X-Ratelimit-Reset-Requests"},
		{&r.tokens, "X-Ratelimit-Limit-Tokens", "X-Ratelimit-Remaining-Tokens", "X-Ratelimit-Reset-Tokens"},
	} {
		if !k.of.set {
			continue
		}
		h[k.limit] = []string{strconv.FormatInt(k.of.limit, 10)}
		h[k.remaining] = []string{strconv.FormatInt(k.of.left, 10)}
		if k.of.reset > 0 {
			h[k.reset] = []string{k.of.reset.String()}
		}
	}
}

// A nearLimit is a limit of a day or longer that is mostly spent.
type nearLimit struct {
	token, name, project, projectID string // token and name are "" where it is the project's own
	limit                           string // in words
	part                            float64
}

// nearLimits returns the limits of which part (0.8) or more is spent. It looks at most projects and tokens each: more than that
// are not looked through for a page.
func (g *registry) nearLimits(now int64, part float64, most int) []nearLimit {
	g.mu.RLock()
	var projects []*liveProject
	for _, p := range g.projects {
		if projects = append(projects, p); len(projects) == most {
			break
		}
	}
	var tokens []*liveToken
	for _, t := range g.byID {
		if tokens = append(tokens, t); len(tokens) == most {
			break
		}
	}
	g.mu.RUnlock()
	var out []nearLimit
	for _, p := range projects {
		st := p.state.Load()
		out = append(out, p.limiter.near(&p.limiter.project, now, part, nearLimit{project: st.name, projectID: st.id})...)
	}
	for _, t := range tokens {
		st, p := t.state.Load(), t.project.state.Load()
		out = append(out, t.project.limiter.near(&t.limits, now, part, nearLimit{token: st.id, name: st.name, project: p.name, projectID: p.id})...)
	}
	return out
}

// fullest sorts limits, the fullest first.
func fullest(all []nearLimit) {
	slices.SortFunc(all, func(a, b nearLimit) int {
		return cmp.Or(cmp.Compare(b.part, a.part), cmp.Compare(a.project, b.project), cmp.Compare(a.name, b.name), cmp.Compare(a.limit, b.limit))
	})
}

// near returns the limits of a subject that are mostly spent, each as of.
func (l *limiter) near(sub *subject, now int64, part float64, of nearLimit) []nearLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	return nearOf(sub.counters, now, part, of)
}

func nearOf(counters []*counter, now int64, part float64, of nearLimit) (out []nearLimit) {
	for _, c := range counters {
		if !c.limit.quota() || c.limit.shadow || c.limit.max == 0 {
			continue
		}
		c.advance(now)
		if of.part = float64(c.used) / float64(c.limit.max); of.part >= part {
			of.limit = c.limit.String()
			out = append(out, of)
		}
	}
	return out
}
