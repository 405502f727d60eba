// The page of /admin that shows what a call said and was answered, where its
// project keeps that. It is the answer to a form, for to look is an act: the
// audit trail has each.
package main

import "time"

// A contentPage is what is kept of a call.
type contentPage struct {
	contentView
	Parts []contentPart
}

// A contentPart is one body with its name.
type contentPart struct {
	Name string
	bodyView
	Cut bool // there was more of it
}

func (s *server) contentPageOf(r *pageRequest) (*page, error) {
	id := parseRequestID(r.path("id"))
	if id == 0 {
		return nil, errNotFound
	}
	v, err := s.revealContent(r.manageRequest, id)
	if err != nil {
		return nil, err
	}
	p := &contentPage{contentView: *v}
	for _, b := range []contentPart{{"What it said", v.Request, false}, {"What it was answered", v.Answer, false}} {
		b.Cut = b.Kept < b.Bytes
		p.Parts = append(p.Parts, b)
	}
	return &page{template: "content", title: "Content · " + v.ID, data: p}, nil
}

// keptUntil says until when there is content of a call to show, nil if there is
// none, or none for who asks.
func (s *server) keptUntil(r *pageRequest, id int64) (*stamp, error) {
	if !r.can(roleAdmin) {
		return nil, nil
	}
	until, err := s.store.contentUntil(r.ctx, id)
	if err != nil || until <= time.Now().UnixMilli() {
		return nil, err
	}
	return new(stamp(until)), nil
}
