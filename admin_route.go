// The page of /admin that tries a project's route for a model.
package main

import (
	"errors"
	"strings"
	"time"
)

// A routePage is a project's route as it was tried, if it was.
type routePage struct {
	Project    projectView
	Model, API string
	Mistake    string // of what was asked for
	Fallback   string
	Lines      []routePageLine
}

type routePageLine struct {
	routeLineView
	Percent string
	Times   string // of its own, in words; "": none
}

// tryRoutePage shows which provider key would get a call for a model now, and
// why the others would not.
func (s *server) tryRoutePage(r *pageRequest) (*page, error) {
	rep, err := s.getProject(r.asking())
	if err != nil {
		return nil, err
	}
	v := routePage{Project: rep.body.(projectView), Model: r.query.Get("model"), API: r.query.Get("api")}
	p := &page{template: "route", title: "Route in " + v.Project.Name, data: &v}
	if v.Model == "" {
		return p, nil
	}
	rep, err = s.tryRoute(r.asking("model", v.Model, "api", v.API))
	if fe, ok := errors.AsType[*fieldError](err); ok {
		v.Mistake = sentence(fe)
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	route := rep.body.(routeView)
	v.Fallback = route.FallbackModel
	for _, l := range route.Upstreams {
		v.Lines = append(v.Lines, routePageLine{l, percent(100 * l.Share), l.times()})
	}
	return p, nil
}

// times says in words how long a call waits there, as far as its own settings
// say.
func (l *routeLineView) times() string {
	var set []string
	for _, t := range []struct {
		what string
		ms   int64
	}{{"connection", l.ConnectMS}, {"answer", l.AnswerMS}, {"first event", l.FirstEventMS}, {"pauses", l.IdleMS}} {
		if t.ms > 0 {
			set = append(set, t.what+" "+(time.Duration(t.ms)*time.Millisecond).String())
		}
	}
	return strings.Join(set, ", ")
}
