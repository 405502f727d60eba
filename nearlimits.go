// This room finds the limits that are nearly spent, of the projects and tokens
// that are live: for the dashboard, which says what needs attention. Plain code.
package main

import (
	"cmp"
	"slices"
)

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
