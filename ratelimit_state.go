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

// limitLoadTimeout is how long a call may wait, with the others of its project, for
// the past of a limit that is new to this process.
const limitLoadTimeout = 2 * time.Second

// A limitState joins live limits to what the store knows of their past.
type limitState struct {
	store    *store
	ledger   *ledger
	registry *registry
}

// syncLimits puts the limits of t's policy and of its project's in force. The
// caller holds the limiter's mu, so that no call of the project comes or ends
// meanwhile.
func (ls *limitState) syncLimits(t *liveToken, now int64) error {
	if err := ls.syncProjectLimits(t.project, now); err != nil {
		return err
	}
	st := t.state.Load()
	return ls.syncScope(&t.project.limiter, &t.limits, &st.policy, t.project.state.Load().seq, st.seq, now)
}

func (ls *limitState) syncProjectLimits(p *liveProject, now int64) error {
	st := p.state.Load()
	return ls.syncScope(&p.limiter, &p.limiter.project, &st.policy, st.seq, 0, now)
}

// syncScope makes the counters of sub those of p, unless they are.
func (ls *limitState) syncScope(l *limiter, sub *limitScope, p *policy, project, token, now int64) error {
	if sub.policy == p {
		return nil
	}
	var past []periodUsage
	if sub.needsHistory(p) {
		ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
		defer cancel()
		if sub.admitted { // what it used may still be on its way into the sums
			if err := ls.ledger.flush(ctx); err != nil {
				return fmt.Errorf("waiting for the ledger: %w", err)
			}
		}
		var err error
		if past, err = ls.loadPastUsage(ctx, p, project, token, now); err != nil {
			return err
		}
	}
	l.setPolicy(sub, p, now, func(l *limit) int64 { return sumUsage(past, l) })
	return nil
}

// periodUsage are what was used in one kind of window.
type periodUsage struct {
	period limitPeriod
	rows   []pastUsage
}

// loadPastUsage reads what was used in each window that a limit of p has.
func (ls *limitState) loadPastUsage(ctx context.Context, p *policy, project, token, now int64) ([]periodUsage, error) {
	var out []periodUsage
next:
	for i := range p.Limits {
		per := p.Limits[i].period
		if per < perHour {
			continue
		}
		for _, o := range out {
			if o.period == per {
				continue next
			}
		}
		grain := "day"
		if per == perHour {
			grain = "hour"
		}
		from, _ := per.window(now)
		uses, err := ls.store.usageSince(ctx, grain, project, token, from)
		if err != nil {
			return nil, err
		}
		out = append(out, periodUsage{per, uses})
	}
	return out, nil
}

// sumUsage adds up what counts in l. A model that was not kept apart counts in
// every limit: a limit may refuse too early after a restart, never too late.
func sumUsage(past []periodUsage, l *limit) (n int64) {
	for _, p := range past {
		if p.period != l.period {
			continue
		}
		for _, u := range p.rows {
			_, pattern, _ := strings.Cut(u.endpoint, " ")
			asked := u.requestedModel
			if asked == otherModels {
				asked = strings.TrimSuffix(l.model, "*")
			}
			if !l.applies(u.endpoint, pattern, asked) {
				continue
			}
			switch l.metric {
			case metricRequests:
				n += u.calls
			case metricTokens:
				n += u.tokens
			case metricDollars:
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
	ResetsAt    *timestamp      `json:"resets_at"`    // null: never, or when calls end
	WouldRefuse int64           `json:"would_refuse"` // calls, since this process counts
}

func newLimitViews(counters []*limitCounter, now int64) []limitView {
	out := make([]limitView, 0, len(counters))
	for _, c := range counters {
		c.advance(now)
		l := c.limit
		v := limitView{Count: l.metric.String(), Max: l.valueJSON(l.max), Per: l.period.String(), Endpoint: l.endpoint, Model: l.model, Shadow: l.monitorOnly,
			Used: l.valueJSON((c.used + c.scale() - 1) / c.scale()), Reserved: l.valueJSON(c.reserved), Left: l.valueJSON(c.remaining()), WouldRefuse: c.wouldRefuse}
		if l.metric == metricConcurrent { // what runs is in use, not set aside
			v.Used, v.Reserved = v.Reserved, v.Used
		}
		if at := c.resetTime(now); at > now {
			v.ResetsAt = new(timestamp(at))
		}
		out = append(out, v)
	}
	return out
}

// resetTime is when all of the limit will be there again, now if it is, 0 if it
// never will be by itself.
func (c *limitCounter) resetTime(now int64) int64 {
	switch {
	case c.limit.period.bucketMS() > 0 && c.limit.max > 0:
		return now + (c.used+c.limit.max-1)/c.limit.max
	case c.windowEnd > 0:
		return c.windowEnd
	}
	return 0
}

// withLiveUsage returns a row with the calls that it does not know of yet: it learns of
// one when that has ended.
func (ls *limitState) withLiveUsage(row *tokenRow, now int64) *tokenRow {
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
		if err := ls.syncLimits(t, now); err != nil {
			return nil, errLimitsUnavailable(err)
		}
		return newLimitViews(t.limits.counters, now), nil
	}
	return ls.storedLimits(ctx, row.policy, false, row.project, row.seq, now)
}

// projectLimits shows how the limits of a project stand.
func (ls *limitState) projectLimits(ctx context.Context, row *projectRow, now int64) ([]limitView, error) {
	if p := ls.registry.liveProject(row.seq); p != nil {
		p.limiter.mu.Lock()
		defer p.limiter.mu.Unlock()
		if err := ls.syncProjectLimits(p, now); err != nil {
			return nil, errLimitsUnavailable(err)
		}
		return newLimitViews(p.limiter.project.counters, now), nil
	}
	return ls.storedLimits(ctx, row.policy, true, row.seq, 0, now)
}

// storedLimits is for what no call has used of late: all is in the store.
func (ls *limitState) storedLimits(ctx context.Context, text string, ofProject bool, project, token, now int64) ([]limitView, error) {
	counters, err := ls.storedCounters(ctx, text, ofProject, project, token, now)
	if err != nil {
		return nil, err
	}
	return newLimitViews(counters, now), nil
}

func (ls *limitState) storedCounters(ctx context.Context, text string, ofProject bool, project, token, now int64) ([]*limitCounter, error) {
	p, err := parsePolicy([]byte(text), ofProject)
	if err != nil {
		return nil, err
	}
	past, err := ls.loadPastUsage(ctx, &p, project, token, now)
	if err != nil {
		return nil, err
	}
	counters := make([]*limitCounter, 0, len(p.Limits))
	for i := range p.Limits {
		counters = append(counters, newLimitCounter(&p.Limits[i], now, sumUsage(past, &p.Limits[i])))
	}
	return counters, nil
}

// A rateHeader is what is left of a limit, as the headers x-ratelimit-* say it.
type rateHeader struct {
	set              bool
	limit, remaining int64
	reset            time.Duration // until all of it is there again; 0: no such time is known
}

// rateHeaders are those of a token's tightest limits of requests and of tokens.
type rateHeaders struct{ requests, tokens rateHeader }

// rateHeaders finds the limits of t of which least is left. The caller holds the
// limiter's mu. The project's limits are not shown: they say what others use.
func (t *liveToken) rateHeaders(most, now int64) (r rateHeaders) {
	if most >= 0 {
		r.requests = rateHeader{set: true, limit: most, remaining: max(0, most-t.used.Load())}
	}
	for _, c := range t.limits.counters {
		to := &r.requests
		switch l := c.limit; {
		case l.metric == metricTokens:
			to = &r.tokens
		case l.metric != metricRequests:
			continue
		}
		if c.limit.monitorOnly {
			continue
		}
		c.advance(now)
		if left := c.remaining(); !to.set || left < to.remaining {
			*to = rateHeader{true, c.limit.max, left, time.Duration(max(0, c.resetTime(now)-now)) * time.Millisecond}
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
		h[k.remaining] = []string{strconv.FormatInt(k.of.remaining, 10)}
		if k.of.reset > 0 {
			h[k.reset] = []string{k.of.reset.String()}
		}
	}
}

// A nearLimit is a limit of a day or longer that is mostly spent.
type nearLimit struct {
	token, name, project, projectID string // token and name are "" where it is the project's own
	limit                           string // in words
	fraction                        float64
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
		out = append(out, p.limiter.nearLimits(&p.limiter.project, now, part, nearLimit{project: st.name, projectID: st.id})...)
	}
	for _, t := range tokens {
		st, p := t.state.Load(), t.project.state.Load()
		out = append(out, t.project.limiter.nearLimits(&t.limits, now, part, nearLimit{token: st.id, name: st.name, project: p.name, projectID: p.id})...)
	}
	return out
}

// sortNearLimits sorts limits, the fullest first.
func sortNearLimits(all []nearLimit) {
	slices.SortFunc(all, func(a, b nearLimit) int {
		return cmp.Or(cmp.Compare(b.fraction, a.fraction), cmp.Compare(a.project, b.project), cmp.Compare(a.name, b.name), cmp.Compare(a.limit, b.limit))
	})
}

// nearLimits returns the limits of a subject that are mostly spent, each as of.
func (l *limiter) nearLimits(sub *limitScope, now int64, part float64, of nearLimit) []nearLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	return filterNearLimits(sub.counters, now, part, of)
}

func filterNearLimits(counters []*limitCounter, now int64, part float64, of nearLimit) (out []nearLimit) {
	for _, c := range counters {
		if !c.limit.isQuota() || c.limit.monitorOnly || c.limit.max == 0 {
			continue
		}
		c.advance(now)
		if of.fraction = float64(c.used) / float64(c.limit.max); of.fraction >= part {
			of.limit = c.limit.String()
			out = append(out, of)
		}
	}
	return out
}
