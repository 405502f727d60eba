// The page of /admin that shows what a call said and was answered, where its
// project keeps that. It is the answer to a form, for to look is an act: the
// audit trail has each.
package main

import (
	"bytes"
	"encoding/json"
	"time"
)

// A contentPage is what is kept of a call.
type contentPage struct {
	contentView
	Parts []contentPart
}

// A contentPart is one body with its name.
type contentPart struct {
	Name string
	bodyView
	Cut    bool   // there was more of it
	Pretty string // its text; JSON on lines of its own
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
	for _, b := range []contentPart{{Name: "What it said", bodyView: v.Request}, {Name: "What it was answered", bodyView: v.Answer}} {
		b.Cut = b.Kept < b.Bytes
		if b.Text != nil {
			b.Pretty = pretty(*b.Text)
		}
		p.Parts = append(p.Parts, b)
	}
	return &page{template: "content", title: "Content · " + v.ID, data: p}, nil
}

// pretty indents JSON, and leaves everything else as it is.
func pretty(text string) string {
	var out bytes.Buffer
	if json.Indent(&out, []byte(text), "", "  ") != nil {
		return text
	}
	return out.String()
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
